"""Every error says what, where, what was found and how to fix it; all of them derive from `DitProbeError`."""


class DitProbeError(Exception):
    """Base of every error that dit-probe raises on purpose."""


class ModelError(DitProbeError):
    """The object to trace is not a pipeline or transformer that dit-probe can attach to."""


class SiteError(DitProbeError):
    """An activation was asked for where the model does not have it."""


class ProbeError(DitProbeError):
    """A probe, or a combination of probes, is contradictory or incomplete."""


class ConceptError(DitProbeError):
    """The list of concepts, or the embeddings given for it, cannot be used."""


class TraceError(DitProbeError):
    """A planned record was not made: hooks that did not fire, layers or steps that were never reached."""


class ReplayError(TraceError):
    """The concept stream, run on the prompt's own tokens, does not give what the model gives."""


class EditError(DitProbeError):
    """An edit cannot be made, or was never made."""


class StoreError(DitProbeError):
    """A store cannot be created, continued or read."""


class StoreFault(StoreError):
    """A store cannot be written, whatever sample comes next: no space, no connection, another run's, another writer."""


class MapError(DitProbeError):
    """A score or saliency map cannot be computed from the dataset, or would say nothing."""


class MetricError(DitProbeError):
    """Maps and masks that cannot be compared, or numbers that cannot be summed up."""


class ConceptWarning(UserWarning):
    """A concept splits into several tokens and only the first is used."""


class ModelWarning(UserWarning):
    """A model is of no known family, and what it is taken for rests on a guess that was checked."""


class IncompleteWarning(UserWarning):
    """A store holds samples whose recording was cut short."""

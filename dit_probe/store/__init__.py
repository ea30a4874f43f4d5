"""Create, continue and open a trace: one Zarr v3 group that is one `xarray.Dataset`.

A variable is one array whose chunks are one (sample, [branch,] step, layer) with whole token dims, so that every write
is a whole chunk and independent of every other. ``xarray.open_zarr`` reads a store without this package; `open` adds
what Zarr cannot say (bfloat16, names of concepts, what is incomplete).

**Killed at any time, readable at any time.** Lengths along ``sample`` live in every array, and those arrays cannot all
grow at once. What readers go by is therefore the consolidated metadata in the group's own ``zarr.json``: it is replaced
last, in one atomic write, after the arrays have grown and the labels of the new samples are there. ``done`` of a sample
is set after its last record.

**Strings** are Zarr's variable-length ``string`` (the codec vlen-utf8), which is specified and, unlike fixed-length
text, does not warn. Labels along ``sample`` share chunks of `LABELS_PER_CHUNK`, so that opening a thousand samples does
not read a thousand files each; a store has one writer at a time, which for directories a lock of the kernel sees to.

**A data set** has a `Room`: a slot for every sample from the start, so that many processes fill one store, each whole
blocks of samples, and none of them changes a length or a chunk of another's. Its labels ``failed`` and ``content`` say
with ``done`` what became of each sample.

**Damaged** chunks are found by their crc32c where they are read, and named; `damaged` reads them all. What a store from
elsewhere may ask for is bounded: `dit_probe.store.limits`.

How numbers are encoded, and why: `dit_probe.store.encoding`.
"""

from dit_probe.store.checked import damaged
from dit_probe.store.creation import LABELS_PER_CHUNK, create
from dit_probe.store.reading import info, open
from dit_probe.store.room import Room, Status
from dit_probe.store.writer import Writer

__all__ = ["LABELS_PER_CHUNK", "Room", "Status", "Writer", "create", "damaged", "info", "open"]

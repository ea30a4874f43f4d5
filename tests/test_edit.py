"""Edits of every family's activations: what they change, what they leave alone, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conformance_cases import CASES, close, predict
from tracing_cases import SIZES, generate, traced

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.edit import ATTENTION_SITES, Point
from dit_probe.errors import EditError, IncompleteWarning, ReplayError, SiteError
from probes.prompt_attention import PromptAttention

FAMILIES = ("flux", "sd3", "cogvideox")


def same(activation: torch.Tensor, point: Point) -> torch.Tensor:
    return activation


def edited(tiny: testing.TinyModel, *edits: dp.Edit, probe: dp.Probe | None = None):
    """The prediction of a tiny model under edits, and the trace if there is a probe."""
    with dp.trace(tiny.transformer, *([probe] if probe else []), edits=edits, progress=False) as run:
        found = predict(tiny)
    return (found, run.dataset) if probe else found


def refused(tiny: testing.TinyModel) -> bool:
    """Is the attention of this model no one call over all tokens, so that edits of q, k, v and o are refused?"""
    if type(anatomy.find(tiny.transformer)).joint_call is anatomy.Anatomy.joint_call:
        return False
    try:
        edited(tiny, dp.Edit("v_x", same, layers="all"))
    except EditError:
        return True
    return False


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_an_identity_leaves_every_family_as_it_is(family: str, variant: str):
    tiny = testing.tiny_model(family, variant)
    before = predict(tiny)
    assert torch.equal(edited(tiny, dp.Edit("x", same, layers="all")), before)
    if not refused(tiny):
        everywhere = [dp.Edit(site, same, layers="all") for site in (*ATTENTION_SITES, "x")]
        assert torch.equal(edited(tiny, *everywhere), before)
    assert testing.leftovers(tiny.transformer) == []


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_what_is_recorded_is_what_the_model_went_on_with(family: str, variant: str):
    """Softmax(q k) v of the recorded, edited q, k, v is the recorded o; and the prediction is another one."""
    tiny = testing.tiny_model(family, variant)
    if refused(tiny):
        return
    kinds = {block.kind for block in anatomy.find(tiny.transformer).blocks(tiny.transformer)}
    layers = "joint" if "joint" in kinds else "single"
    record = [f"{letter}_{stream}" for letter in "qkvo" for stream in "xp"]
    halved = [dp.Edit(f"{letter}_x", lambda a, point: a / 2, layers=layers) for letter in "qkv"]
    found, ds = edited(tiny, *halved, probe=dp.Probe(record=record, layers=layers))
    assert not torch.equal(found, predict(tiny))
    _, before = edited(tiny, dp.Edit("x", same, layers="all"), probe=dp.Probe(record=record, layers=layers))
    first = ds.layer.values[0]
    for name, factor in (("v_x", 0.5), ("q_x", 0.5), ("k_p", 1.0)):
        close(ds[name].sel(layer=first), factor * before[name].sel(layer=first))
    if family in FAMILIES:  # without masks, registers and references
        for layer in ds.layer.values:
            one = ds.isel(sample=0, step=0).sel(layer=layer)
            q, k, v, o = (torch.cat([torch.from_numpy(one[f"{letter}_{s}"].values) for s in "xp"]) for letter in "qkvo")
            weights = torch.einsum("qhd,khd->hqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
            close(o, torch.einsum("hqk,khd->qhd", weights, v))


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_edited_where_blocks_hand_them_on(family: str):
    tiny, seen = testing.tiny_model(family), {}

    def watch(call, output):
        seen[call.block.layer] = call.x, call.p

    with torch.no_grad(), testing.watched(tiny.transformer, watch):
        edits = [dp.edits.zero("x", layers=[0], tokens=[1, 2]), dp.edits.mean("p", layers=[0])]
        _, ds = edited(tiny, *edits, probe=dp.Probe(record=["x", "p"], layers=[0]))
    x, p = seen[1]
    assert not x[:, 1:3].any() and x[:, 0].any()
    close(p, p.mean(1, keepdim=True).expand_as(p))
    close(ds.x.isel(step=0, layer=0), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_replay_looks_at_what_was_there_before_an_edit(family: str, monkeypatch: pytest.MonkeyPatch):
    tiny = testing.tiny_model(family)
    edits = [dp.edits.zero(site, layers=[0]) for site in ("v_p", "k_p", "o_p", "p")]
    probe = dp.Probe(record=["o_x"])
    edited(tiny, *edits, probe=probe)
    side = type(anatomy.find(tiny.transformer).text)
    project = side.project
    monkeypatch.setattr(side, "project", lambda self, c, context: project(self, c.flip(-1), context))
    with pytest.raises(ReplayError):
        edited(tiny, *edits, probe=probe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_patched_with_its_own_store_is_the_same_run(family: str):
    pipe, sites = testing.tiny_pipeline(family), ["q_x", "k_x", "v_x", "o_x", "q_p", "k_p", "v_p", "o_p", "x"]
    before, ds = traced(pipe, dp.Probe(record=sites, layers="all"))
    with dp.trace(pipe, edits=[dp.edits.patch(ds, site, layers="all") for site in sites], progress=False):
        after = generate(pipe)
    assert torch.equal(after, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_stream_of_another_prompt_gives_its_picture(family: str):
    """Image tokens meet a prompt in its keys and values alone, and in the pooled vector where there is one."""
    pipe, other = testing.tiny_pipeline(family), "a boat on water"
    expected, ds = traced(pipe, dp.Probe(record=["k_p", "v_p"], layers="all"), call={"prompt": other})
    call = {"prompt": "a sun in the sky", "guidance_scale": 0.0} if family == "sd3" else {"prompt": "a sun in the sky"}
    if family == "sd3":
        expected, ds = traced(
            pipe, dp.Probe(record=["k_p", "v_p"], layers="all"), call={"prompt": other, "guidance_scale": 0.0}
        )
    modulation = anatomy.find(pipe).conditioner(pipe.transformer)
    pooled = []
    if modulation is not None:  # the pooled vector of the other prompt, too
        keep = modulation.register_forward_hook(lambda module, args, output: pooled.append(output))
        generate(pipe, **{**call, "prompt": other})
        keep.remove()
    turns = iter(pooled)
    swap = modulation.register_forward_hook(lambda *_: next(turns)) if modulation is not None else None
    try:
        plain = generate(pipe, **call) if modulation is None else None
        with dp.trace(pipe, edits=[dp.edits.patch(ds, site, layers="all") for site in ("k_p", "v_p")], progress=False):
            found = generate(pipe, **call)
    finally:
        if swap is not None:
            swap.remove()
    close(found, expected)
    assert plain is None or not torch.allclose(plain, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_edges_have_no_weight(family: str):
    tiny = testing.tiny_model(family)
    cut = dp.edits.block("image", "prompt", key_tokens=[0, 2])
    found, ds = edited(tiny, cut, probe=PromptAttention())
    weights = ds.attention_x_to_p
    assert not weights.isel(prompt_token=[0, 2]).any() and (weights.isel(prompt_token=[1, 3]) > 0).all()
    assert not torch.equal(found, predict(tiny))
    _, ds = edited(tiny, dp.edits.block("prompt", "image"), probe=PromptAttention())
    assert not ds.attention_p_to_x.any() and ds.attention_x_to_p.any()
    with pytest.raises(EditError, match="may look at no key"):
        edited(tiny, dp.Edit("attends", lambda keep, point: torch.zeros_like(keep)))


@pytest.mark.parametrize("family", ["sd3", "cogvideox"])
def test_an_edit_is_made_on_its_branch_only(family: str):
    pipe = testing.tiny_pipeline(family)
    call = {"guidance_scale": 3.0}
    _, before = traced(pipe, dp.Probe(record=["v_x"], layers=[0], steps=[0]), branch="both", call=call)
    with dp.trace(
        pipe,
        dp.Probe(record=["v_x"], layers=[0], steps=[0]),
        edits=[dp.edits.zero("v_x", branch="uncond")],
        branch="both",
        progress=False,
    ) as run:
        generate(pipe, **call)
    after = run.dataset.v_x
    assert not after.sel(branch="uncond").any()
    assert (after.sel(branch="cond") == before.v_x.sel(branch="cond")).all()


def test_edits_are_made_in_their_steps():
    pipe, steps = testing.tiny_pipeline("flux"), []
    edit = dp.Edit("x", lambda x, point: (steps.append((point.step, point.layer)), x)[1], layers=[1], steps=[-1])
    with dp.trace(pipe, edits=[edit], progress=False):
        generate(pipe, steps=3)
    assert steps == [(2, 1)]


def test_a_sample_that_is_there_is_edited_all_the_same(tmp_path):
    """A run that completes another records nothing of what is done, and its pictures are those of the first run."""
    pipe, store, probe = testing.tiny_pipeline("flux"), str(tmp_path / "run.zarr"), dp.Probe(record=["x"], layers=[0])

    def interrupt(module, args):
        calls.append(module)
        if len(calls) > 3:  # two steps of the first picture, one of the second
            raise KeyboardInterrupt

    def run() -> torch.Tensor:
        with dp.trace(pipe, probe, store=store, edits=[dp.edits.zero("v_p")], progress=False):
            first = generate(pipe, seed=0)
            generate(pipe, seed=1)
        return first

    with dp.trace(pipe, edits=[dp.edits.zero("v_p")], progress=False):
        silenced = generate(pipe, seed=0)
    assert not torch.equal(silenced, generate(pipe, seed=0))
    calls = []
    hook = pipe.transformer.norm_out.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    hook.remove()
    with pytest.warns(IncompleteWarning):
        assert dp.open(store).done.values.tolist() == [True, False]
    assert torch.equal(run(), silenced)


def test_gradients_go_through_edits():
    tiny = testing.tiny_model("flux")
    strength = torch.tensor(0.5, requires_grad=True)
    push = dp.Edit("v_x", lambda v, point: v * (1 + strength))
    shift = dp.Edit("x", lambda x, point: x + strength)
    with dp.trace(tiny.transformer, edits=[push, shift], progress=False):
        tiny.transformer(**tiny.inputs)[0].square().mean().backward()
    assert strength.grad is not None and strength.grad != 0


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda: dp.Edit("o_c", same), EditError, "edits are made at q_x"),
        (lambda: dp.Edit("x", same, branch="left"), EditError, "choose cond, uncond or both"),
        (lambda: dp.Edit("x", 3), EditError, "give one that takes an activation"),
        (lambda: dp.Edit("x", same, layers=[9]), SiteError, "no layer 9"),
        (lambda: dp.Edit("x", same, steps=[7]), EditError, "step 7 is never reached; this run has 2 steps"),
        (lambda: dp.Edit("x", same, branch="uncond"), EditError, "never made.*no uncond branch"),
        (lambda: dp.Edit("x", lambda x, point: x[:, :1]), EditError, r"layer 0, step 0 returned \(1, 1, 32\)"),
        (lambda: dp.edits.zero("x", heads=[0]), EditError, "residual streams have no heads"),
        (lambda: dp.edits.zero("o_x", heads=[5]), EditError, "of head, which has 0-1"),
        (lambda: dp.edits.zero("x", tokens=[99]), EditError, "of x, which has 0-23"),
        (lambda: dp.edits.zero("x", tokens=torch.ones(3, dtype=torch.bool)), EditError, "a mask of 3 tokens for 24"),
        (lambda: dp.edits.zero("attends"), EditError, "see edits.block"),
        (lambda: dp.edits.block("image", "words"), EditError, "'words' is no stream"),
        (lambda: dp.edits.steer(torch.ones(3), "x", 1.0), EditError, r"direction \(3,\) for x"),
        (lambda: "zero", EditError, "give a list of dit_probe.Edit"),
    ],
)
def test_what_cannot_be_edited_is_refused(edit, error, says: str):
    pipe = testing.tiny_pipeline("flux")
    with pytest.raises(error, match=says), dp.trace(pipe, edits=[edit()], progress=False):
        generate(pipe)
    assert testing.leftovers(pipe) == []


def test_the_last_block_of_sd3_hands_on_no_text():
    pipe = testing.tiny_pipeline("sd3")
    last = len(pipe.transformer.transformer_blocks) - 1
    with pytest.raises(EditError, match="no text output"):  # noqa: SIM117
        with dp.trace(pipe, edits=[dp.Edit("p", same, layers=[last])], progress=False):
            generate(pipe)


def test_families_of_the_tests_have_pipelines():
    assert {*FAMILIES} <= SIZES.keys()

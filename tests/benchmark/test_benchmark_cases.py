"""Every model at toy size: shapes, operations by formula against PyTorch's counter, shared weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy_cases
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_cases import CPU, PRESET, case_of, small

from latteflow.benchmark import case as case_module
from latteflow.benchmark import ours, stand_ins
from latteflow.benchmark.case import Case, faster_setting
from latteflow.benchmark.paper import BUILDERS
from latteflow.benchmark.whole import draw_whole

SHAPES = {
    "k4": (1, 32, 8, 8),
    "k1": (1, 32, 8, 8),
    "janus": (1, 64),
    "dit": (1, 4, 8, 8),
    "sana": (1, 32, 8, 8),
    "show-o": (2, 48, 32),
    "bagel": (2, 16, 32),
}


GROUPS = {"LaTtE-Flow, K = 2": 2, "LaTtE-Flow, K = 1 (Vanilla, LMFusion-shaped)": 1}


@pytest.fixture(scope="module")
def cases():
    torch.manual_seed(0)
    return {name: case_of(name) for name in BUILDERS}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_gives_finite_numbers_of_the_right_shape(cases, name):
    for number in range(3):
        out = cases[name].step(number)
        assert out.shape == SHAPES[name]
        assert out.isfinite().all()
        assert out.float().std() > 0


@pytest.mark.parametrize("name", SHAPES)
def test_operations_by_formula_are_those_counted(cases, name):
    case = cases[name]
    case.step(0)
    # The attention that PyTorch picks on a CPU has no formula in the counter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        case.step(1)
    if name in ("k4", "k1"):
        assert case.step_flops + _padding(case) - _ahead(case) == counter.get_total_flops()
    else:
        assert case.step_flops * case.slice == counter.get_total_flops()


def _padding(case):
    """The shorter prompt is padded to the longer: operations more than the formula counts."""
    missing = ours.PROMPT_TOKENS - ours.EMPTY_PROMPT_TOKENS
    return 2 * len(case.blocks) // GROUPS[case.name] * 2 * case.tokens * missing * 32


def _ahead(case):
    """What t does to layers and head, and where tokens are, is computed once a picture: operations less."""
    layers, width, time, heads = len(case.blocks) // GROUPS[case.name], 32, 256, 2
    of_t = layers * 4 * width * time + (layers - 1) * heads * time + 2 * time * time + 2 * width * time
    return 2 * 2 * (of_t + case.tokens * width * width)


def test_a_whole_stand_in_has_its_head_too():
    whole = stand_ins.stand_in_case(small(stand_ins.SHOW_O), CPU, torch.float32, whole=True)
    assert whole.slice == 1
    assert whole.step(0).shape == (2, 48, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        whole.step(0)
    assert whole.step_flops == counter.get_total_flops()


def test_steps_are_scaled_by_layers_and_by_guided_steps(cases):
    assert stand_ins.BAGEL_7B.guided_steps == 41
    assert cases["bagel"].steps_timed == (41 + 9 / 2) * 4
    assert cases["show-o"].steps_timed == 50 * 4
    assert cases["janus"].steps_timed == cases["janus"].tokens == 16
    assert cases["bagel"].image_flops == pytest.approx(cases["bagel"].step_flops * 45.5)


def test_real_geometries_are_the_published_ones():
    with torch.device("meta"):
        from diffusers import DiTTransformer2DModel, SanaTransformer2DModel
        from transformers import JanusConfig, JanusForConditionalGeneration

        from latteflow.benchmark import peers

        dit = case_module.count(DiTTransformer2DModel(**peers.DIT_XL_2))
        sana = case_module.count(SanaTransformer2DModel(**peers.SANA_1_6B))
        janus = case_module.count(JanusForConditionalGeneration(JanusConfig(**peers.JANUS_PRO_1B)))
    # DiT-XL/2 has 675M; diffusers' class embeds t and the class in every block, 28 times
    assert dit == pytest.approx(675e6 + 27 * (256 * 1152 + 1152 * 1152 + 1001 * 1152), rel=0.02)
    assert sana == pytest.approx(1604e6, rel=0.01)
    # the published file has a second matrix of words, which drawing does not use
    assert janus + 102400 * 2048 == pytest.approx(2.09e9, rel=0.01)


def test_every_number_of_experts_has_the_same_weights():
    vanilla = ours.build_vanilla(PRESET, CPU, torch.float32)
    for groups in (1, 2, 4):
        replica = ours.regrouped(vanilla, groups)
        assert replica.config.num_groups == len(replica.intervals) == groups
        own, other = (model.layers[3].mlp.up_proj.weight for model in (replica, vanilla))
        assert own.data_ptr() == other.data_ptr()
        gates = [layer.gate is not None for layer in replica.layers]
        assert gates == [number % (4 // groups) != 0 for number in range(4)]


def test_a_few_steps_visit_every_expert(monkeypatch):
    replica = ours.regrouped(ours.build_vanilla(PRESET, CPU, torch.float32), 4)
    visited = []
    monkeypatch.setattr(replica, "enter_group", visited.append)
    step = ours.sampling_step(replica, steps=40, side=8)
    for number in range(12):
        step(number)
    assert sorted(set(visited)) == [0, 1, 2, 3]
    assert min(visited.count(group) for group in range(4)) >= 2


def test_a_step_is_the_pipelines_step():
    replica = ours.regrouped(ours.build_vanilla(PRESET, CPU, torch.float32), 2)
    torch.manual_seed(0)
    context = ours.random_context(replica)
    x = torch.randn(1, 32, 8, 8)
    torch.manual_seed(0)
    ours.random_context(replica)
    step = ours.sampling_step(replica, steps=4, side=8, context=context)
    with torch.no_grad():
        unconditional, conditional = replica(torch.cat([x, x]), torch.zeros(2), context).chunk(2)
    expected = x + (unconditional + ours.GUIDANCE * (conditional - unconditional)) / 4
    torch.testing.assert_close(step(0), expected, rtol=1e-4, atol=1e-4)


def test_a_whole_picture_runs_prompt_every_step_and_decoder():
    calls = []
    case = toy_cases.our_case()
    case.step = lambda number: calls.append(number)
    case.prefill, case.decode = lambda: calls.append("prompt"), lambda: calls.append("decoder")
    whole = draw_whole(case, "cpu", compiled=False, build=1.5)
    assert calls == ["prompt", 0, 1, "decoder", "prompt", *range(10), "decoder"]
    assert whole.build == 1.5
    assert whole.seconds == whole.prefill + whole.denoise + whole.decode


@pytest.mark.slow
def test_a_whole_picture_of_ours_reads_its_prompt():
    case = ours.WholePicture(replace(PRESET, picture_size=64), 2, CPU, torch.float32, 3).case()
    whole = draw_whole(case, "cpu", compiled=False)
    assert case.decode().shape == (1, 3, 64, 64)
    assert min(whole.prefill, whole.denoise, whole.decode) > 0


def _case(eager, compiled, clock):
    """A case that takes so long in either setting, with one layer."""

    class Layer(torch.nn.Module):
        def compile(self, **settings):
            self._compiled_call_impl = settings

    layer = Layer()

    def step(number):
        clock.append(compiled if layer._compiled_call_impl else eager)

    figures = dict.fromkeys(("resolution", "tokens", "steps", "passes", "parameters", "active_parameters"), 1)
    return Case(name="x", what="", step_flops=1.0, weight_bytes=1, step=step, blocks=[layer], **figures)


@pytest.mark.parametrize(("eager", "compiled"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_setting_is_kept(monkeypatch, eager, compiled):
    clock = []
    case = _case(eager, compiled, clock)
    monkeypatch.setattr(case_module, "timed", lambda call, device: (call(), clock[-1])[1])
    assert faster_setting(case, CPU) == {"eager": eager, "compiled": compiled}
    assert (case.blocks[0]._compiled_call_impl is not None) == (compiled < eager)


def test_where_nothing_compiles_a_case_stays_eager(monkeypatch):
    clock = []
    case = _case(1.0, 0.5, clock)
    run = case.step

    def step(number):
        if case.blocks[0]._compiled_call_impl:
            raise case_module.TorchDynamoException("no compiler")
        run(number)

    case.step = step
    monkeypatch.setattr(case_module, "timed", lambda call, device: (call(), clock[-1])[1])
    assert faster_setting(case, CPU) == {"eager": 1.0, "compiled": float("inf")}
    assert case.blocks[0]._compiled_call_impl is None

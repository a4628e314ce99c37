"""Group residency: two groups' weights at most, fetched ahead, the same pixels; and what it refuses."""

import re
import shutil
import threading
import time
import weakref
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file, save_file

from latteflow import LatteFlowPipeline
from latteflow.errors import UserError
from latteflow.flow.schedulers import make_scheduler
from latteflow.models.residency import GroupResidency, disable_group_residency, enable_group_residency
from latteflow.models.weight_store import transformer_without_layers
from toys import seeded, shake, toy_pipeline

STEPS = 8
FROM_REPLICA = {"prefix": None, "use_safetensors": True}


def pixels(pipe, **settings):
    settings = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt", **settings}
    return pipe("a red circle", **settings).images


def saved(folder, groups=2, *, shard=None, **settings):
    """Save a toy of four layers; return the folder."""
    toy_pipeline(groups, **settings).save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    return folder


def loaded(folder, **settings):
    pipe = LatteFlowPipeline.from_pretrained(folder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_layers(folder, dtype=torch.float32):
    return loaded(folder, dtype=dtype, transformer=transformer_without_layers(folder, dtype))


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "model")


@pytest.fixture
def ledger(monkeypatch):
    """What is fetched, by whom, and beside how many groups that are alive or being fetched."""
    return Ledger(monkeypatch)


class Ledger:
    def __init__(self, monkeypatch):
        self.fetched, self.threads, self.others_at_start, self.begun = [], [], [], {}
        self.delay, self._taken = 0.0, []
        original = GroupResidency._fetch

        def fetch(residency, group, parameters):
            self.others_at_start.append(self.groups_alive())
            self._taken.append([weakref.ref(parameter) for parameter in parameters])
            self.fetched.append(group)
            self.threads.append(threading.current_thread())
            self.begun.setdefault(group, threading.Event()).set()
            time.sleep(self.delay)
            original(residency, group, parameters)

        monkeypatch.setattr(GroupResidency, "_fetch", fetch)

    def groups_alive(self):
        return sum(any(reference() is not None for reference in group) for group in self._taken)


def watch(pipe, ledger):
    """Count, at every call of a layer's inside, the groups in place and the fetched groups alive."""
    seen, transformer = [], pipe.transformer
    groups = [[transformer.layers[n] for n in transformer.layers_of(k)] for k in range(transformer.config.num_groups)]

    def look(*_):
        present = [
            group
            for group, layers in enumerate(groups)
            if any(not parameter.is_meta for layer in layers for parameter in layer.parameters())
        ]
        seen.append((present, ledger.groups_alive()))

    for layer in transformer.layers:
        layer.input_layernorm.register_forward_pre_hook(look)
    return seen


def residency_threads():
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        alive = [thread for thread in threading.enumerate() if thread.name.startswith("latteflow-residency")]
        if not alive:
            return []
        time.sleep(0.01)
    return alive


# ---- the same pixels


@pytest.mark.parametrize(
    ("groups", "settings", "dtype"),
    [
        (1, {}, torch.float32),
        (2, {}, torch.float32),
        (4, {}, torch.float32),
        (2, {}, torch.bfloat16),
        (4, {"scheduler": "heun"}, torch.bfloat16),
        (2, {"scheduler": "heun"}, torch.float32),
        (4, {"scheduler": "unipc", "shared_io": False}, torch.float32),
        (2, {"intervals": [0.0, 0.2, 1.0], "residual_attention": "logits"}, torch.float32),
    ],
)
def test_pixels_are_the_same_bit_for_bit(tmp_path, ledger, groups, settings, dtype):
    folder = saved(tmp_path / "model", groups, **settings)
    pipe = loaded(folder, dtype=dtype)
    expected = pixels(pipe)
    for resident in (pipe, without_layers(folder, dtype)):
        ledger.fetched.clear()
        resident.enable_group_residency(folder)
        assert torch.equal(pixels(resident), expected)
        assert ledger.fetched == list(range(groups))  # once an interval, not once a step
        if groups > 1:
            assert torch.equal(pixels(resident), expected)
            assert ledger.fetched == 2 * list(range(groups))
        resident.disable_group_residency()
        assert torch.equal(pixels(resident), expected)
    assert residency_threads() == []


def test_shards_and_embedded_models_are_read_too(tmp_path):
    folder = saved(tmp_path / "model", 4, shard="40KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    pipe = without_layers(folder)
    pipe.enable_group_residency(folder)
    assert torch.equal(pixels(pipe), pixels(loaded(folder)))

    pipe = loaded("emoji-64")
    expected = pixels(pipe, num_inference_steps=4)
    pipe.enable_group_residency("emoji-64")
    assert torch.equal(pixels(pipe, num_inference_steps=4), expected)


def test_a_dtype_that_the_file_does_not_have(tmp_path):
    folder = tmp_path / "model"
    toy_pipeline().to(torch.bfloat16).save_pretrained(folder)
    expected = pixels(loaded(folder))
    pipe = without_layers(folder)
    pipe.enable_group_residency(folder)
    assert pipe.transformer.dtype == torch.float32
    assert torch.equal(pixels(pipe), expected)


def test_jumps_between_groups_and_mixed_times_in_one_forward(tmp_path, ledger):
    folder = saved(tmp_path / "model", 4)
    whole, resident = loaded(folder), without_layers(folder)
    resident.enable_group_residency(folder)
    seen, ledger.delay = watch(resident, ledger), 0.02  # slower than a step: what is not wanted is still on its way
    context = whole.encode_prompt(["a red circle", "no", "a blue triangle"])
    x_t = torch.randn(3, 4, 4, 4, generator=seeded())
    with torch.no_grad():
        for times in ([0.1, 0.6, 0.9], [0.9, 0.1, 0.6], [0.3] * 3, [0.8] * 3, [0.1] * 3, [0.8] * 3, [0.6] * 3):
            t = torch.tensor(times)
            assert torch.equal(resident.transformer(x_t, t, context), whole.transformer(x_t, t, context))
    assert max(alive for _, alive in seen) <= 2
    assert max(ledger.others_at_start) <= 1
    assert residency_threads() == []


def test_fewer_steps_than_groups(tmp_path):
    folder = saved(tmp_path / "model", 4)
    pipe = loaded(folder)
    expected = [pixels(pipe, num_inference_steps=steps) for steps in (1, 2, 3)]
    pipe.enable_group_residency(folder)
    for steps, picture in zip((1, 2, 3), expected, strict=True):
        assert torch.equal(pixels(pipe, num_inference_steps=steps), picture)


def test_a_run_that_was_stopped_leaves_a_sound_state(folder):
    pipe = loaded(folder)
    expected = pixels(pipe)
    pipe.enable_group_residency(folder)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    pixels(pipe, callback_on_step_end=stop)
    assert torch.equal(pixels(pipe), expected)


# ---- two groups at most, fetched ahead


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_two_groups_at_most_and_one_in_place(tmp_path, ledger, groups):
    folder = saved(tmp_path / "model", groups, scheduler="heun")
    pipe = without_layers(folder)
    assert all(parameter.is_meta for parameter in pipe.transformer.layers.parameters())
    assert not any(parameter.is_meta for parameter in pipe.transformer.io.parameters())
    assert not pipe.transformer.training
    pipe.enable_group_residency(folder)
    seen = watch(pipe, ledger)
    for _ in range(2):
        pixels(pipe)
    assert all(len(present) == 1 for present, _ in seen)
    calls = Counter(present[0] for present, _ in seen)
    assert set(calls) == set(range(groups))
    assert sum(calls.values()) == 2 * (2 * STEPS - 1) * 4 // groups  # every layer of a group, twice a step but the last
    assert max(alive for _, alive in seen) <= 2
    assert max(ledger.others_at_start) <= 1  # beside the one that is then fetched
    assert threading.main_thread() not in ledger.threads


def test_the_next_group_is_fetched_while_one_works(tmp_path, ledger):
    folder = saved(tmp_path / "model", 4)
    pipe = without_layers(folder)
    pipe.enable_group_residency(folder)
    ahead = []

    def look(pipe, step, timestep, tensors):
        group = step * 4 // STEPS
        last_of_group = (step + 1) * 4 // STEPS > group
        if not last_of_group and group < 3:  # a whole step before its first call
            ahead.append(ledger.begun.setdefault(group + 1, threading.Event()).wait(5))

    pixels(pipe, callback_on_step_end=look)
    assert ahead == [True] * 3
    assert residency_threads() == []
    assert ledger.groups_alive() == 1  # after the last group nothing is fetched
    assert ledger.fetched == [0, 1, 2, 3]


def test_what_was_loaded_is_freed_at_once(folder):
    pipe = loaded(folder)
    parameters = [weakref.ref(parameter) for parameter in pipe.transformer.layers.parameters()]
    pipe.enable_group_residency(folder)
    assert all(reference() is None for reference in parameters)
    assert all(parameter.is_meta for parameter in pipe.transformer.layers.parameters())


# ---- from memory: on a CPU only to show that the way is the same


def test_weights_kept_in_memory(ledger):
    pipe = toy_pipeline(4)
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    expected = pixels(pipe)
    residency = GroupResidency(pipe.transformer, None, torch.device("cpu"))
    seen = watch(pipe, ledger)
    assert torch.equal(pixels(pipe), expected)
    assert ledger.fetched == [0, 1, 2, 3]
    assert all(len(present) == 1 for present, _ in seen)
    residency.end()
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(pixels(pipe), expected)


if torch.cuda.is_available():  # elsewhere there is nothing to say

    @pytest.mark.parametrize("from_disk", [False, True])
    def test_on_a_gpu(folder, from_disk):
        expected = pixels(loaded(folder).to("cuda"))
        pipe = loaded(folder)
        pipe.enable_group_residency(folder if from_disk else None, device="cuda")
        for _ in range(3):
            assert torch.equal(pixels(pipe), expected)
        pipe.disable_group_residency()
        assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"cuda"}
        assert torch.equal(pixels(pipe), expected)


# ---- adapters


def with_adapter(pipe):
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    adapter = [parameter for parameter in pipe.transformer.layers.parameters() if parameter.requires_grad]
    for number, parameter in enumerate(adapter):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(number)))
    return pipe


def test_adapters_loaded_before_stay_and_count(folder):
    plain = pixels(loaded(folder))
    expected = pixels(with_adapter(loaded(folder)))
    assert not torch.allclose(expected, plain, atol=1e-3)
    pipe = loaded(folder)
    pipe.transformer.load_lora_adapter(adapter_of(folder), **FROM_REPLICA)
    pipe.enable_group_residency(folder)
    assert torch.equal(pixels(pipe), expected)
    pipe.transformer.disable_adapters()
    assert torch.equal(pixels(pipe), plain)
    pipe.transformer.enable_adapters()
    pipe.disable_group_residency()
    assert torch.equal(pixels(pipe), expected)


def adapter_of(folder):
    place = folder.parent / "adapter"
    with_adapter(loaded(folder)).transformer.save_lora_adapter(place)
    return place


def test_adapters_that_change_while_it_is_enabled_are_refused(folder):
    pipe = with_adapter(loaded(folder))
    pipe.enable_group_residency(folder)
    with pytest.raises(UserError, match="disable_group_residency"):
        pipe.transformer.load_lora_adapter(adapter_of(folder), **FROM_REPLICA, adapter_name="other")
    pipe.transformer.delete_adapters("default")
    with pytest.raises(UserError, match="adapters were loaded, removed or fused"):
        pixels(pipe)


def test_fused_adapters_are_in_no_file(folder):
    pipe = with_adapter(loaded(folder))
    pipe.transformer.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        pipe.enable_group_residency(folder)
    expected = pixels(pipe)
    residency = GroupResidency(pipe.transformer, None, torch.device("cpu"))  # memory holds them
    assert torch.equal(pixels(pipe), expected)
    residency.end()


def test_an_adapter_that_lost_its_weights_is_refused(folder):
    pipe = without_layers(folder)
    pipe.transformer.load_lora_adapter(adapter_of(folder), **FROM_REPLICA, low_cpu_mem_usage=True)
    with pytest.raises(UserError, match="load all layers first"):
        pipe.enable_group_residency(folder)


# ---- an end to it


def test_disabling_restores(folder, tmp_path):
    pipe = loaded(folder)
    pipe.transformer.layers[0].requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()}
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    pipe.enable_group_residency(folder)
    pixels(pipe)
    with pytest.raises(UserError, match="disable_group_residency"):
        pipe.save_pretrained(tmp_path / "again")
    pipe.disable_group_residency()
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()} == trained
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    pipe.save_pretrained(tmp_path / "again")
    assert torch.equal(pixels(loaded(tmp_path / "again")), pixels(loaded(folder)))
    pipe.enable_group_residency(folder)  # and again
    pipe.disable_group_residency()
    pipe.disable_group_residency()  # nothing to do


def test_gradients_are_refused_and_possible_afterwards(folder):
    pipe = loaded(folder)
    pipe.enable_group_residency(folder)
    context = pipe.encode_prompt(["no"])
    call = (torch.randn(1, 4, 4, 4, generator=seeded()), torch.tensor([0.3]), context)
    with pytest.raises(UserError, match=r"not for gradients.*no_grad"):
        pipe.transformer(*call)
    with torch.inference_mode():
        expected = pipe.transformer(*call)
    pipe.disable_group_residency()
    v = pipe.transformer(*call)
    assert torch.equal(v.detach(), expected)
    v.square().mean().backward()
    assert pipe.transformer.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


# ---- mistakes


def test_a_file_that_vanishes_surfaces_and_may_come_back(tmp_path):
    folder = saved(tmp_path / "model", 2, shard="40KB")
    index = {key: file for file in (folder / "transformer").glob("*.safetensors") for key in load_file(file)}
    early, late = index["layers.0.mlp.up_proj.weight"], index["layers.3.mlp.down_proj.weight"]
    assert early != late
    pipe = without_layers(folder)
    pipe.enable_group_residency(folder)
    expected = pixels(pipe)
    for file in (early, late):  # while it is waited for, and while it is fetched ahead
        file.rename(tmp_path / "away")
        steps = []
        with pytest.raises(UserError, match=r"layers\.\d.* cannot be read"):
            pixels(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors, steps=steps: steps.append(step))
        assert len(steps) == (0 if file == early else STEPS // 2)
        assert residency_threads() == []
        (tmp_path / "away").rename(file)
        assert torch.equal(pixels(pipe), expected)
    early.rename(tmp_path / "away")
    with pytest.raises(UserError, match="cannot be read"):
        pipe.disable_group_residency()
    (tmp_path / "away").rename(early)
    assert torch.equal(pixels(pipe), expected)  # still enabled
    pipe.disable_group_residency()
    assert torch.equal(pixels(pipe), expected)


def test_any_exception_of_the_reading_thread_surfaces(folder, monkeypatch):
    pipe = without_layers(folder)
    pipe.enable_group_residency(folder)

    def broken(residency, group, parameters):
        raise ZeroDivisionError(threading.current_thread().name)

    monkeypatch.setattr(GroupResidency, "_fetch", broken)
    with pytest.raises(ZeroDivisionError, match="latteflow-residency"):
        pixels(pipe)
    assert residency_threads() == []


def test_enabling_twice_or_beside_another_offloading(folder):
    pipe = loaded(folder)
    pipe.enable_group_residency(folder)
    with pytest.raises(UserError, match="enabled already"):
        pipe.enable_group_residency(folder)
    pixels(pipe)
    pipe = loaded(folder)
    apply_group_offloading(pipe.transformer, torch.device("cpu"), num_blocks_per_group=2)
    with pytest.raises(UserError, match="offloaded, or hooked, by diffusers"):
        pipe.enable_group_residency(folder)


def test_folders_that_do_not_do(folder, tmp_path):
    pipe = loaded(folder)
    expected = pixels(pipe)
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="holds no safetensors: give a folder"):
            pipe.enable_group_residency(place)
        with pytest.raises(UserError, match="holds no safetensors"):
            transformer_without_layers(place)
    other = saved(tmp_path / "other", num_layers=2)
    with pytest.raises(UserError, match=r"layers\..* lack it"):
        pipe.enable_group_residency(other)
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = next((broken / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    save_file({**weights, "layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=r"layers\.1\.mlp.* hold \[3, 3\]"):
        pipe.enable_group_residency(broken)
    save_file({name: weight for name, weight in weights.items() if not name.startswith("io.")}, file)
    with pytest.raises(UserError, match=r"io\.0.* lack it"):
        transformer_without_layers(broken)
    save_file(weights, file)
    shutil.copy(file, file.with_name("more.safetensors"))
    with pytest.raises(UserError, match=r"both .* hold"):
        pipe.enable_group_residency(broken)
    file.with_name("more.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        pipe.enable_group_residency(broken)
    assert torch.equal(pixels(pipe), expected)  # refused, and left as it was


def test_devices_that_do_not_do(folder):
    pipe = loaded(folder)
    with pytest.raises(UserError, match="give the folder of the saved pipeline"):
        pipe.enable_group_residency()
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(UserError, match=f"no device '{device}'"):
            pipe.enable_group_residency(folder, device=device)
    with pytest.raises(UserError, match="was not loaded: give the folder"):
        GroupResidency(transformer_without_layers(folder), None, torch.device("cpu"))


def test_packed_weights_are_refused(folder):
    class Packed(torch.nn.Parameter):
        pass

    pipe = loaded(folder)
    projection = pipe.transformer.layers[0].mlp.up_proj
    projection.weight = Packed(projection.weight.detach())
    with pytest.raises(UserError, match="is a Packed"):
        pipe.enable_group_residency(folder)


def test_the_replica_alone(folder):
    pipe = loaded(folder)
    expected = pixels(pipe)
    enable_group_residency(pipe.transformer, folder)
    assert torch.equal(pixels(pipe), expected)
    disable_group_residency(pipe.transformer)
    shake(pipe.transformer, seeded(5))
    pipe.scheduler = make_scheduler("heun")
    changed = pixels(pipe)
    enable_group_residency(pipe.transformer, folder)  # what the folder holds counts
    assert not torch.allclose(pixels(pipe), changed, atol=1e-3)


def test_the_documents_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 4
    torchao = find_spec("torchao") is not None
    for example in examples:  # each by itself
        if torchao or "quantization" not in example:
            exec(compile(example, "memory.md", "exec"), {})
    assert {place.name for place in tmp_path.iterdir()} == {"adapter", "fused", *(["small"] if torchao else [])}
    pixels(loaded(tmp_path / "fused"), num_inference_steps=1)

"""From a trained model to a small file to text: sizes to the byte, the same text, errors in one line."""

from __future__ import annotations

import io
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkernels import QuantLinear, cli, files, quantize
from qatkernels.nn import model_bytes
from qatkernels.trainer import TrainConfig, train
from qatkernels.trainer import generate as job
from qatkernels.trainer.demo_model import Cache, ModelConfig, Transformer
from qatkernels.trainer.generate import generate

from .conftest import TINY

BITS = {"w4": 4, "w2": 2, "w1.58": 2, "w1": 1}
#: The quantized layers of a block of TINY's width, as (N, K): qkv, out, gate_up, down.
LAYERS = ((96, 32), (32, 32), (192, 32), (32, 96))


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run long enough for a model that is sure of most of what it says."""
    out = tmp_path_factory.mktemp("run")
    settings: dict[str, Any] = {**TINY, "steps": 150, "qat_steps": 60, "lr": 1e-2, "qat_lr": 5e-3, "eval_every": 1000}
    settings |= {"bits": (4, 2, 1.58, 1), "data": str(text), "out": str(out)}
    train(TrainConfig(**settings), say=lambda line: None)
    return out


@pytest.fixture(scope="module")
def packed(run: Path) -> dict[str, Path]:
    files = {name: run / f"{name}.safetensors" for name in BITS}
    for name, file in files.items():
        assert cli.main(["pack", str(run / name), str(file)]) == 0
    return files


def test_sizes_to_the_byte(run: Path, packed: dict[str, Path]) -> None:
    rest = 4 * (2 * 256 * 32 + 3 * 32)  # embedding, head, norms
    full = rest + 4 * sum(n * k for n, k in LAYERS)
    previous = full
    for name, file in packed.items():
        expected = rest + sum(n * (k * BITS[name] // 8) + 4 * n for n, k in LAYERS)
        assert model_bytes(load(file)) == expected
        with open(file, "rb") as content:
            (header,) = struct.unpack("<Q", content.read(8))
        assert file.stat().st_size == 8 + header + expected
        assert header < 4000
        report = files.read_json(run / name / "phase.json")["result"]
        assert report["model_bytes"] == expected
        assert expected <= previous
        previous = expected


def load(path: Path) -> torch.nn.Module:
    return job.load(path)[0]


def test_the_command_says_the_sizes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", str(run / "w2"), str(tmp_path / "x"), "--scale-dtype", "bfloat16"]) == 0
    size = (tmp_path / "x").stat().st_size
    full = 4 * (2 * 256 * 32 + 3 * 32 + sum(n * k for n, k in LAYERS))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'x'}: {size:,} bytes, {full / size:.1f} times smaller than in float32 ({full:,})"
    assert second.endswith(f"{full / 2 / size:.1f} times smaller than in bfloat16 ({full // 2:,})")
    assert load(tmp_path / "x").get_submodule("blocks.0.mlp.down").weight.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BITS)
def test_the_same_text_as_the_fake_quantized_model(run: Path, packed: dict[str, Path], name: str) -> None:
    """Greedy, beyond the context. Logits differ by the order of additions, and no choice is nearly that close."""
    written = []
    for path in (run / name, packed[name]):
        written.append(list(generate(load(path), b"red is", 80)))
    tokens = [bytes(token for token, _ in text) for text in written]
    assert tokens[0] == tokens[1]
    theirs, mine = (torch.stack([logits for _, logits in text]) for text in written)
    best = theirs.topk(2).values
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert (best[:, 0] - best[:, 1] > 4e-4).all(), "too close to a tie to compare texts"
    if name != "w1":
        assert b" is number " in tokens[0]


#: How far 16 bits may move a logit, in units of the largest. Each of a dozen operations on the way rounds to 8 bits, by
#: at most u = 2^-8; independent errors, evenly spread, add up to sqrt(12 / 3) u = 2 u. Twice that is allowed.
ROUNDING = 4 * 2.0**-8


def _tokens(model: Path) -> torch.Tensor:
    """A text that a model wrote itself: one that both read, so that a difference does not become another text."""
    text = bytes(token for token, _ in generate(load(model), b"red is", 26))
    return torch.tensor([list(b"red is" + text)])


def _logits(model: torch.nn.Module, tokens: torch.Tensor, autocast: bool = False) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(tokens)[0].float()


@pytest.mark.parametrize("name", BITS)
def test_bfloat16_agrees_where_it_is_not_a_tie(run: Path, packed: dict[str, Path], name: str) -> None:
    """Under autocast, or packed first and then cast, the codes are those that training ended with.

    Then nothing differs but roundings along the way, and a near tie may fall either way.
    """
    tokens = _tokens(run / name)
    exact = _logits(load(run / name), tokens)
    theirs = _logits(load(run / name), tokens, autocast=True)
    best, bound = theirs.topk(2).values, ROUNDING * exact.abs().max()
    assert (theirs - exact).abs().max() <= bound
    clear = best[:, 0] - best[:, 1] > 4 * bound  # two logits, moved in either model
    assert clear.float().mean() > 0.5
    for mine in (_logits(load(packed[name]), tokens, autocast=True), _logits(load(packed[name]).bfloat16(), tokens)):
        assert (mine - exact).abs().max() <= bound
        assert torch.equal(theirs.argmax(-1)[clear], mine.argmax(-1)[clear])


def _codes(model: torch.nn.Module) -> torch.Tensor:
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return torch.cat([quantize(m.weight.detach(), m.scale.detach(), m.grid).flatten() for m in layers])


@pytest.mark.parametrize("name", BITS)
def test_casting_the_masters_changes_codes(run: Path, name: str) -> None:
    """`model.bfloat16()` rounds weights across the edges between codes, and each of them is then a whole step off."""
    tokens = _tokens(run / name)
    model, cast, rounded = load(run / name), load(run / name).bfloat16(), load(run / name)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16().float()
    for layer, other in zip(rounded.modules(), cast.modules(), strict=True):
        if isinstance(layer, QuantLinear):
            layer.scale.data = other.scale.detach().float()
    assert torch.equal(_codes(cast), _codes(rounded)), "a code that the rounding of its weight does not explain"
    flipped = int((_codes(rounded) != _codes(model)).sum())
    assert (flipped > 0) == (name != "w1"), "the sign of a weight survives any rounding, other codes do not all"
    exact, expected = _logits(model, tokens), _logits(rounded, tokens)
    bound = ROUNDING * exact.abs().max()
    moved = (expected - exact).abs().max()
    assert (_logits(cast, tokens) - expected).abs().max() <= bound
    if flipped:
        assert moved > bound, f"{flipped} codes flipped, without harm"
    else:
        assert moved <= bound


def test_generate_writes_the_same_from_folder_and_file(
    run: Path, packed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for path in (run / "w2", packed["w2"]):
        assert cli.main(["generate", str(path), "--prompt", "green", "--tokens", "40"]) == 0
        out, err = capsys.readouterr()
        assert err.startswith("40 tokens, ")
        assert err.endswith(" tokens/s\n")
        texts.append(out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("green is number ")
    assert len(texts[0]) == len("green") + 40 + 1


def test_temperature_draws_by_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        command = ["generate", str(run / "fp"), "--tokens", "30", "--temperature", "1", "--seed", seed]
        assert cli.main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_bytes_that_are_no_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(run / "fp"), "--tokens", "50", "--temperature", "50"]) == 0
    assert "\ufffd" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", [b"\xff", b"\xc3", "\u00fc \u2192 ".encode(), b"red is"], ids=repr)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_prompt_on_any_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prompt: bytes, encoding: str
) -> None:
    """A prompt is any bytes. The text continues them, and is printed with the characters that the terminal has."""
    given = os.fsdecode(prompt)
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        assert cli.main(["generate", str(run / "fp"), "--tokens", "9", "--prompt", given]) == 0
    assert capsys.readouterr().err.startswith("9 tokens, ")
    text = prompt + bytes(token for token, _ in generate(load(run / "fp"), prompt, 9))
    wanted = (text.decode(errors="replace") + "\n").encode(encoding, "replace")
    assert shown.buffer.getvalue() == wanted  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", ["0", "-1", str(-(2**63)), str(2**64 - 1)])
def test_seeds_up_to_the_ends(run: Path, seed: str) -> None:
    assert cli.main(["generate", str(run / "fp"), "--tokens", "3", "--temperature", "1", "--seed", seed]) == 0


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_the_coldest_draw_is_the_likeliest_byte(temperature: float) -> None:
    model = peaked()
    cold, greedy = (list(generate(model, b"abc", 30, temperature=t)) for t in (temperature, 0))
    assert [token for token, _ in cold] == [token for token, _ in greedy]


def test_a_model_is_not_packed_onto_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "w2"
    shutil.copytree(run / "w2", folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder / "model.safetensors")
    for out in (folder / "model.safetensors", folder / "phase.json", folder / ".." / "w2" / "model.safetensors",
                tmp_path / "link"):  # fmt: skip
        for command in (["pack"], ["export", "--to", "onnx"]):
            assert cli.main([*command, str(folder), str(out)]) == 2
            assert f"{out} is a file of the model in {folder}" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert cli.main(["pack", str(folder), str(folder / "packed.safetensors")]) == 0


def peaked() -> Transformer:
    """A random model with logits of the size that a trained one has."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 2, 24)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    return model


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 7, 11], [20, 4]], ids=str)
@torch.no_grad()
def test_a_cache_changes_nothing_but_the_order_of_additions(chunks: list[int]) -> None:
    model, cache = peaked(), Cache(ModelConfig(32, 2, 2, 24))
    tokens = torch.randint(256, (3, 24))
    whole = model(tokens)
    parts = torch.cat([model(part, cache) for part in tokens.split(chunks, 1)], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
    assert cache.length == 24
    with pytest.raises(ValueError, match="tokens has 1 positions after the 24 of the cache, must have at most 0"):
        model(tokens[:, :1], cache)


def test_generation_with_and_without_a_cache() -> None:
    """Past the end of the context, too, where the window moves by half of it."""
    model = peaked()
    for prompt in (b"a", b"a longer prompt than the context of the model"):
        cached, plain = (list(generate(model, prompt, 60, cached=c)) for c in (True, False))
        assert [t for t, _ in cached] == [t for t, _ in plain]
        for (_, a), (_, b) in zip(cached, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    # Text outside the window has no influence.
    long = next(generate(model, b"x" * 10 + b"y" * 24, 1))[1]
    torch.testing.assert_close(long, next(generate(model, b"y" * 24, 1))[1])


def test_a_token_costs_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = peaked(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    list(generate(model, b"abc", 40))
    assert lengths == [3, *[1] * 21, 12, *[1] * 12, 12, *[1] * 4]


def test_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate(peaked(), b"", 3))


def test_errors_are_one_line_and_exit_code_2(
    run: Path, packed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(packed["w2"].read_bytes()[:-100])
    empty = tmp_path / "empty"
    empty.mkdir()
    capsys.readouterr()
    for command, message in (
        (["pack", str(run / "fp"), str(tmp_path / "x")], "holds no quantized layer, there is nothing to pack"),
        (["pack", str(empty), str(tmp_path / "x")], "phase.json cannot be read"),
        (["pack", str(tmp_path / "none"), str(tmp_path / "x")], "cannot be read: No such file"),
        (["pack", str(run / "w2"), str(broken / "x")], "cannot be written"),
        (["pack", str(run / "w2"), str(empty)], "cannot be written"),
        (["generate", str(broken)], f"{broken} is damaged"),
        (["generate", str(empty)], "phase.json cannot be read"),
        (["generate", str(tmp_path / "none")], "cannot be read"),
        (["generate", str(run / "w2" / "model.safetensors")], "is not a packed model"),
        (["generate", str(run / "w2"), "--tokens", "0"], "--tokens is 0, must be at least 1"),
        (["generate", str(run / "w2"), "--temperature", "-1"], "--temperature is -1.0, must be at least 0 and finite"),
        (["generate", str(run / "w2"), "--prompt", ""], "--prompt is empty"),
        (["generate", str(run / "w2"), "--seed", "9" * 23], f"--seed is {'9' * 23}, must be -2**63 to 2**64 - 1"),
        (["generate", str(run / "w2"), "--seed", str(-(2**63) - 1)], "must be -2**63 to 2**64 - 1"),
    ):
        assert cli.main(command) == 2, command
        out, err = capsys.readouterr()
        assert message in err
        assert err.startswith("qatkernels: ")
        assert err.count("\n") == 1
        assert not out


def test_a_folder_of_another_version(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (
        ({"model": {"width": 64}}, "heads is 3, twice that must divide"),
        ({"model": {"layers": 3}}, "unexpected keyword"),
        ({"quantization": {"bits": 2.5}}, "bits is 2.5"),
        ({"quantization": None}, "model.safetensors does not fit the model: it has a "),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        described = {**files.read_json(run / "w2" / "phase.json"), **change}
        files.write_json(folder / "phase.json", described)
        files.save(folder / "model.safetensors", files.load(run / "w2" / "model.safetensors")[0], described)
        with pytest.raises(files.CheckpointError, match=message):
            load(folder)
        assert cli.main(["generate", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2**20, "heads": 2}, "its model has at least .* weights, which .* bytes cannot hold"),
        ({"depth": 10**9}, "its model has at least .* weights"),
        ({"context": 2**40}, "context is 1099511627776, whose rotary angles take .* bytes"),
        ({"context": 2**22}, "context is 4194304, whose rotary angles take .* bytes, must be at most 134217728"),
        ({"depth": 1.5}, "depth is 1.5, must be a whole number"),
    ],
)
def test_a_model_that_no_file_can_hold(
    packed: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """A header is checked before the model is built, because the file may come from an untrusted source."""
    tensors, header = files.load(packed["w2"])
    header["config"]["model"] |= change
    files.save(tmp_path / "x.safetensors", tensors, header)
    with pytest.raises(files.CheckpointError, match=message):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("command", ["pack", "generate"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    wanted = {"pack": ["CKPT", "OUT", "--scale-dtype"], "generate": ["MODEL", "--prompt", "--tokens", "--temperature"]}
    text = capsys.readouterr().out
    assert all(word in text for word in wanted[command])


def test_check(run: Path, packed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(run / "w2")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "4 layers checked, no problem found"
    assert cli.main(["check", str(packed["w2"])]) == 0
    assert "packed, bits=2" in capsys.readouterr().out
    dead = tmp_path / "dead"
    shutil.copytree(run / "w4", dead)
    tensors, about = files.load(dead / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".scale"))
    tensors[name][:2] = -1.0
    files.save(dead / "model.safetensors", tensors, about)
    assert cli.main(["check", str(dead)]) == cli.BROKEN
    assert f"problem: {name.removesuffix('.scale')} has 2 of" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path / "nothing")]) == cli.BAD_USAGE

"""Malformed inputs: whatever is typed or put in a file, a command refuses it in one line and changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.campaign.child import run
from tests.campaign.tally import Tally
from tests.samples import STUDY_YAML

TIMEOUT = 60.0
_SIGNS = "()+=,.\"'\\#;:@-_ \t\n\0[]{}*%$!?<>|&~^0123456789eEinfNaN\u00e9\u4e2d\U0001f600"
_METHODS = (
    "trades(beta=6)+vfd(weight=0.02)",
    "at+ar-at(weight=30)",
    "mart+kd(robust=0.6)",
    "hat(gamma=0.5)",
    "natural",
)
_ATTACKS = (
    "pgd(steps=20, step_size=2/255)",
    "worst(apgd-ce, square(queries=10))",
    "cw(c=1)",
    "fab-t(targets=3)",
    "fgsm",
)
_MODELS = ("small-cnn(width=16)", "resnet18", "wide-resnet-28-10", "vgg16(width=8)")
_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-1",
    "0",
    "1e-320",
    "9" * 30,
    "8/0",
    "1/",
    "0x10",
    "1_0",
    "true",
    "None",
    "",
)
_FLAGS = (
    "epochs", "batch-size", "lr", "momentum", "weight-decay", "clip-norm", "eps", "steps", "step-size", "validation",
    "subset", "label-smoothing", "awp", "ema-decay", "swa-every", "extra-share", "seed", "milestones", "peak", "warmup",
    "checkpoint-seconds", "time-budget", "image-size", "width", "device", "precision", "schedule", "norm", "start",
    "mode", "augment", "average", "name", "recipe", "model", "data", "runs", "vanilla",
)  # fmt: skip
Case = tuple[list[str], str]  # a command, and what makes its input malformed


def malform(inputs: int, seed: int, folder: Path, tally: Tally, out_of_time: Any) -> None:
    """Give commands `inputs` malformed inputs, kind by kind."""
    base = folder / "inputs-base"
    base.mkdir()
    made = run(["train", "natural", *_quick("digits"), "--name", "run"], base)
    assert made.code == 0, made.err
    assert run(["evaluate", "runs/run", "--attacks", "none", "-n", "20", "--device", "cpu"], base).code == 0
    for trial in range(inputs):
        if out_of_time():
            return
        name, make = list(KINDS.items())[trial % len(KINDS)]
        luck = random.Random(f"{seed}:input:{trial}")
        here = folder / "input"
        shutil.copytree(base, here)
        command, what = make(luck, here)
        before = _listing(here)
        outcome = run(command, here, timeout=TIMEOUT)
        wrong = ""
        if outcome.code == 124:
            wrong = f"no answer within {TIMEOUT:g} s"
        elif outcome.has_traceback or outcome.code not in (0, 2):
            wrong = f"exit code {outcome.code}: {outcome.err[-300:]}"
        elif outcome.code == 2 and not outcome.is_one_line:
            wrong = f"not one line: {outcome.err[-400:]!r}"
        elif outcome.code == 2 and len(outcome.err) > 2000:
            wrong = f"a line of {len(outcome.err)} characters"
        elif outcome.code == 2 and (changed := before ^ _listing(here)):
            wrong = f"refused, but changed {sorted(changed)[:3]}"
        tally.count("inputs", name, f"{seed}:input:{trial}", f"{what[:200]!r}: {wrong}" if wrong else "")
        shutil.rmtree(here)


def _quick(data: str) -> list[str]:
    return [
        "--data", data, "--model", "small-cnn(width=2)", "--recipe", "digits", "--epochs", "1", "--steps", "1",
        "--batch-size", "256", "--validation", "4", "--device", "cpu",
    ]  # fmt: skip


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    """Return every file below a folder but the cache, with its size and date."""
    files = [file for file in folder.rglob("*") if file.is_file() and "cache" not in file.relative_to(folder).parts]
    return {(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def _mutated(text: str, luck: random.Random) -> str:
    """Return a text with a few letters taken out, put in, doubled or made long."""
    for _ in range(luck.randint(1, 3)):
        at = luck.randrange(len(text) + 1)
        match luck.randrange(6):
            case 0:
                text = text[:at] + text[at + 1 :]
            case 1:
                text = text[:at] + luck.choice(_SIGNS) + text[at:]
            case 2:
                text = text[:at] + text[at : at + luck.randint(1, 9)] * luck.randint(2, 4) + text[at:]
            case 3:
                text = text[:at] + luck.choice(("(" * 300, "x" * 100_000, "+at" * 2000, "-" * 50)) + text[at:]
            case 4:
                text = text.replace(luck.choice("0123456789=(") or "=", luck.choice(_NUMBERS), 1)
            case _:
                text = text[::-1] if luck.random() < 0.1 else text[:at].upper() + text[at:]
    return text.replace("\0", "") or "("  # no argument of a process holds a zero byte


def _method(luck: random.Random, here: Path) -> Case:
    text = _mutated(luck.choice(_METHODS), luck)
    return ["train", text, *_quick("nothere")], text


def _attack(luck: random.Random, here: Path) -> Case:
    text = _mutated(luck.choice(_ATTACKS), luck)
    return ["evaluate", "runs/run", "--attacks", text, "-n", "4", "--device", "cpu", "--out", "results"], text


def _model(luck: random.Random, here: Path) -> Case:
    text = _mutated(luck.choice(_MODELS), luck)
    return ["train", "at", *_quick("nothere"), "--model", text], text


def _flag(luck: random.Random, here: Path) -> Case:
    flag, value = luck.choice(_FLAGS), luck.choice((*_NUMBERS, _mutated("linf", luck), _mutated("0.5", luck)))
    return ["train", "at", *_quick("nothere"), f"--{flag}", value], f"--{flag} {value}"


def _evaluate_flag(luck: random.Random, here: Path) -> Case:
    flag = luck.choice(("n", "norm", "eps", "batch-size", "precision", "seed", "checkpoint", "data", "mean", "device"))
    value = luck.choice(_NUMBERS)
    return ["evaluate", "runs/run", "--attacks", "none", f"--{flag}", value], f"--{flag} {value}"


def _arrays(luck: random.Random, here: Path) -> Case:
    n, draw = luck.randint(0, 12), np.random.default_rng(luck.randrange(2**32))
    shapes = [(n, 8, 8), (n, 8, 8, 3), (n, 3, 8, 8), (n,), (), (n, 0, 0), (n, 8, 8, 5), (0, 8, 8)]
    images: dict[str, Any] = {
        "uint8": draw.integers(0, 255, luck.choice(shapes)).astype(np.uint8),
        "float": draw.random(luck.choice(shapes)) * luck.choice((1, 1.0000001, 255, -1)),
        "nan": np.full((n, 8, 8), np.nan),
        "int": draw.integers(0, 255, luck.choice(shapes)),
        "objects": np.array([{"a": 1}], dtype=object),
        "text": np.array(["a", "b"]),
        "complex": draw.random((n, 8, 8)) * 1j,
    }
    labels: dict[str, Any] = {
        "int": draw.integers(0, 3, n),
        "negative": draw.integers(-3, 3, n),
        "float": draw.random(n),
        "short": draw.integers(0, 3, max(0, n - 1)),
        "matrix": draw.integers(0, 3, (n, 2)),
        "huge": np.full(n, 2**62),
        "objects": np.array([None] * n, dtype=object),
    }
    chosen = luck.choice(list(images)), luck.choice(list(labels))
    names = luck.choice((("x_train", "y_train"), ("x_train",), ("x", "y"), ("x_train", "y_train")))
    np.savez(here / "a.npz", **dict(zip(names, (images[chosen[0]], labels[chosen[1]]), strict=False)))
    if luck.random() < 0.3:
        content = (here / "a.npz").read_bytes()
        (here / "a.npz").write_bytes(content[: luck.randrange(len(content))])
    return ["train", "natural", *_quick("npz:a.npz")], f"npz of {chosen} as {names}"


def _bomb(luck: random.Random, here: Path) -> Case:
    """An array that says it is larger than any memory, or an archive whose members are no arrays."""
    import zipfile

    size = luck.choice((10**9, 10**12, 10**18))
    header = str({"descr": "|u1", "fortran_order": False, "shape": (size, 8, 8)}).ljust(117) + "\n"
    lie = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    junk = luck.choice((lie, b"", b"no array", lie[:20], json.dumps({"a": 1}).encode()))
    with zipfile.ZipFile(here / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", junk)
        archive.writestr("y_train.npy", junk)
    name = luck.choice(("npz:a.npz", "extra"))
    if name == "extra":
        return ["train", "natural", *_quick("digits"), "--extra", "a.npz", "--name", "x"], "a bomb as extra data"
    return ["train", "natural", *_quick(name)], f"a bomb of {size} images"


def _photos(luck: random.Random, here: Path) -> Case:
    root = here / "photos"
    names = luck.sample(["cat", "dog", "$\\foo$", "100% $^$", "\u732b", "a b", ".hidden", "train", "test"], 3)
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(luck.randint(0, 4)):
            file = root / name / f"{k}{luck.choice(('.png', '.jpg', '.txt', '.PNG', '.gif'))}"
            match luck.randrange(5):
                case 0:
                    file.write_bytes(luck.randbytes(luck.randint(0, 200)))
                case 1:
                    file.write_bytes(_huge_png())
                case _:
                    pixels = np.full((luck.randint(1, 9), luck.randint(1, 9), 3), luck.randrange(256), np.uint8)
                    Image.fromarray(pixels).save(file.with_suffix(".png"))
    return ["train", "natural", *_quick("folder:photos"), "--image-size", "8"], f"photos of {names}"


def _huge_png() -> bytes:
    """Return a small file that says it is an image of 400 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (20_000).to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def _yaml(luck: random.Random, here: Path) -> Case:
    match luck.randrange(8):
        case 0:
            text = "a: &a [*a]\ndata: digits\nmethods: *a"
        case 1:
            text = "data: digits\nmethods: " + "[" * 3000 + "]" * 3000
        case 2:
            text = STUDY_YAML.replace("seeds: 2", f"seeds: {luck.choice(('100000000', '-1', 'two', '1e9', '[1]'))}")
        case 3:
            text = "&x {data: digits, methods: [at], recipe: *x}"
        case 4:
            line = luck.choice([line for line in STUDY_YAML.splitlines() if ":" in line])
            text = STUDY_YAML.replace(
                line, f"{line.partition(':')[0]}: {luck.choice((*_NUMBERS, '{}', '[]', '{a: b}'))}"
            )
        case _:
            text = _mutated(STUDY_YAML, luck)
    (here / "mine.yaml").write_text(text)
    return ["study", "mine.yaml", "--dry-run"], text


def _card(luck: random.Random, here: Path) -> Case:
    """A weights file whose card holds anything."""
    junk: list[Any] = [
        None,
        1,
        -1,
        1.5,
        True,
        [],
        {},
        "",
        "x",
        [1, 2],
        {"a": []},
        "../..",
        10**30,
        "small-cnn(width=10**9)",
    ]
    keys = ("model", "classes", "channels", "shape", "data", "norm", "eps", "run", "method", "epochs", "seed", "recipe")
    card: Any = {"model": "small-cnn(width=2)", "classes": 10, "channels": 1, "data": "digits", "shape": [1, 8, 8]}
    for _ in range(luck.randint(1, 3)):
        card[luck.choice(keys)] = luck.choice(junk)
    card = luck.choice((card, card, card, junk))
    save_file({"a": torch.ones(2)}, here / "w.safetensors", metadata={"card": json.dumps(card)})
    verb = luck.choice(("evaluate", "diagnose"))
    return [verb, "w.safetensors", "-n", "4", "--device", "cpu"], f"{verb} {card}"


def _path(luck: random.Random, here: Path) -> Case:
    """A path at which there is no such thing, given to whatever reads or writes one."""
    os.mkfifo(here / "pipe.npz")
    (here / "circle.npz").symlink_to("circle.npz")
    (here / "nothing.npz").symlink_to("absent")
    (here / "folder.npz").mkdir()
    (here / "text.npz").write_text("text")
    path = luck.choice(
        ("pipe.npz", "circle.npz", "nothing.npz", "folder.npz", "text.npz", "x" * 300, "~nobody-here/x", "", "-",
         "runs/run/run.json", "runs/run/best.safetensors/x", "\udcff", "a\nb", "$(x)", "*")
    )  # fmt: skip
    quick = _quick("digits")
    command = luck.choice(
        (
            ["train", "natural", *_quick(f"npz:{path}")],
            ["train", "natural", *_quick(f"folder:{path}")],
            ["train", "natural", *quick, "--extra", path, "--name", "x"],
            ["train", "trades+vfd", *quick, "--vanilla", path, "--name", "x"],
            ["train", "natural", *quick, "--runs", path],
            ["train", "natural", *quick, "--name", path],
            ["evaluate", path, "--attacks", "none", "-n", "4", "--device", "cpu"],
            ["evaluate", f"resnet18@{path}", "--attacks", "none", "-n", "4", "--device", "cpu"],
            ["evaluate", "runs/run", "--attacks", "none", "-n", "4", "--device", "cpu", "--out", path],
            ["evaluate", "runs/run", "--attacks", "fgsm", "-n", "4", "--device", "cpu", "--surrogate", path],
            ["evaluate", "runs/run", "--attacks", "none", "--data", "cifar10", "--data-dir", path],
            ["diagnose", path, "-n", "4", "--device", "cpu"],
            ["transfer", path, "runs/run", "-n", "4", "--device", "cpu"],
            ["compare", path, "runs/run"],
            ["report", path],
            ["study", path, "--dry-run"],
        )
    )
    return command, f"{path!r} in {command[0]}"


def _other_flag(luck: random.Random, here: Path) -> Case:
    """A value of a flag of a command that works on what is there."""
    value = luck.choice((*_NUMBERS, "x" * 100_000, "\u4e2d", "1h", "--", "-n"))
    command, flags = luck.choice(
        (
            (["report", "runs"], ("maps", "data-dir", "nothing")),
            (["compare", "runs/run", "runs/run"], ("checkpoint", "nothing")),
            (
                ["study", "table1", "--dry-run"],
                ("scale", "seeds", "time-budget", "executor", "gpus", "plugin", "device"),
            ),
            (
                ["diagnose", "runs/run", "--device", "cpu"],
                ("n", "seed", "eps", "norm", "batch-size", "checkpoint", "mean"),
            ),
            (["transfer", "runs/run", "runs/run", "--device", "cpu"], ("n", "attack", "eps", "norm", "data", "plugin")),
            (["demo"], ("seed", "time-budget", "nothing")),
            (["list"], ("nothing",)),
        )
    )
    flag = luck.choice(flags)
    if command == ["demo"] and flag != "nothing":  # only what is refused, since the demo takes a minute
        value = luck.choice(("x", "", "nan", "-1", "9" * 30, "1e308"))
    return [*command, f"--{flag}", value], f"{command[0]} --{flag} {value[:50]}"


KINDS: dict[str, Callable[[random.Random, Path], Case]] = {
    "method": _method,
    "attack": _attack,
    "model": _model,
    "flag of train": _flag,
    "flag of evaluate": _evaluate_flag,
    "arrays": _arrays,
    "bombs": _bomb,
    "image folder": _photos,
    "YAML": _yaml,
    "card of weights": _card,
    "path": _path,
    "flag of another command": _other_flag,
}

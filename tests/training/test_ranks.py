"""Several processes train one run as one process does, whatever their number, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.launcher.api as launcher
from tests.training.on_ranks import CASES, assert_near, on_ranks, train_case
from tests.training.on_ranks import QUICK as ON_RANKS
from tests.training.same_runs import assert_same, assert_same_run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig

from advalign.attacks import FGSM, PGD
from advalign.data import load as load_data
from advalign.errors import RankLost, TrainingError, UserError, require
from advalign.evaluation.accuracy import evaluate
from advalign.models import build
from advalign.objectives import as_method
from advalign.runs import Run
from advalign.runtime import ranks
from advalign.runtime.launch import PATIENCE, launch, note_end
from advalign.runtime.ranks import Share
from advalign.runtime.seeds import seed_generators
from advalign.threats import Linf
from advalign.training.loop import _Trainer
from advalign.training.planning import plan
from advalign.training.recipes import Recipe
from advalign.training.train import train

QUICK = ("contrast", "ar-at")
"""Cases with statistics across the batch, and noise drawn by a part."""


ONE_EPOCH = replace(ON_RANKS, epochs=1, average="ema")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, trained when they are asked for."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick cases, trained by two processes."""
    folder = tmp_path_factory.mktemp("shared")

    def work() -> None:
        refuse_ranks_that_differ(folder)
        go_on_as_the_first_does(folder)
        for case in QUICK:
            train_case(case, folder)

    on_ranks(2, work)
    return folder


def refuse_ranks_that_differ(folder: Path) -> None:
    """Ranks with other arguments, and BatchNorms that cannot be synchronised, end before anything is written."""
    me = int(os.environ["RANK"])
    recipe = replace(ONE_EPOCH, lr=(0.05, 0.06)[me])
    for sync_bn, changed, says in (
        (True, recipe, "rank 1 has run .*, and rank 0"),
        (me == 1, ONE_EPOCH, "has sync bn"),
    ):
        with pytest.raises(UserError, match=says):
            train_model("toy", folder, changed, sync_bn=sync_bn)
    with pytest.raises(UserError, match=r"layer1\.1 is tests\.training\.on_ranks\.OwnNorm"):
        train_model("own_norm", folder, ONE_EPOCH, sync_bn=True)
    assert not (folder / "model").exists()


def go_on_as_the_first_does(folder: Path) -> None:
    """A model that draws its weights from what nobody seeds is the same on all ranks; one sees where all go on."""
    runs = folder / f"disk{os.environ['RANK']}"
    planned = plan(
        as_method("at"), load_data("digits"), "tests.training.on_ranks:unseeded", ONE_EPOCH, runs=runs, name="run",
        guests={}, trust_model=True,
    )  # fmt: skip
    planned.run.path.mkdir(parents=True)
    with ranks.joined("cpu"):
        for step in (0, 1):
            trainer = _Trainer(planned, torch.device("cpu"), cuda_graphs=False)
            assert trainer.state.step == step
            ours = (*trainer.objective.parameters(), *trainer.objective.buffers(), *trainer.average.weights)
            mine = torch.cat([each.detach().double().flatten() for each in ours])
            assert torch.equal(ranks.all_sum(mine), 2 * mine)
            trainer.state.step, trainer.state.sums = 1, {"loss": torch.zeros(())}
            trainer.save()
    assert (planned.run.state.exists(), ranks.world()) == (runs.name == "disk0", 1)


@pytest.mark.parametrize("case", QUICK)
def test_two_processes_train_as_one_does(case: str, alone: Path, shared: Path):
    assert_near(train_case(case, alone).path, shared / case)
    assert [row["ranks"] for row in Run.read(shared / case).log] == [2, 2]


def train_model(model: str, folder: Path, recipe: Recipe, *, sync_bn: bool) -> Run:
    return train(
        "at", data="digits", model=f"tests.training.on_ranks:{model}", recipe=recipe, runs=folder, name="model",
        device="cpu", sync_bn=sync_bn, trust_model=True,
    )  # fmt: skip


def meet() -> None:
    """What ranks do together, with what each of them must see."""
    with ranks.joined("cpu"):
        me = dist.get_rank()
        ranks.take_share(Share(torch.tensor([[0, 2], [1, 3, 4]][me]), 5))
        rows = torch.arange(10.0).view(5, 2)
        assert torch.equal(ranks.gather(ranks.own_rows(rows)), rows)
        assert torch.equal(ranks.gather(ranks.own_rows(torch.cat([rows, -rows]))), torch.cat([rows, -rows]))
        ranks.seed_step(7)
        drawn = ranks.draw(torch.randn_like, ranks.own_rows(rows))
        torch.rand(me + 1)  # what a network draws
        drawn = torch.cat([drawn, ranks.draw(torch.randn_like, ranks.own_rows(rows))], 1)
        seed_generators(7)
        assert torch.equal(ranks.gather(drawn), torch.cat([torch.randn_like(rows), torch.randn_like(rows)], 1))
        w = torch.ones(2, requires_grad=True)
        everyone = ranks.gather(ranks.own_rows(rows) * w)
        ranks.own_part((ranks.own_rows(rows) @ w * everyone.square().sum()).mean()).backward()
        ranks.add_up_gradients([w])
        v = torch.ones(2, requires_grad=True)
        (rows @ v * (rows * v).square().sum()).mean().backward()
        assert w.grad is not None
        assert v.grad is not None
        assert torch.allclose(w.grad, v.grad)
        assert ranks.agree(me == 1, False) == (True, False)
        assert list(ranks.spread([1, 2, 3], lambda n: (n, ranks.world()))) == [(1, 1), (2, 1), (3, 1)]
        with pytest.raises(UserError, match=r"^full$"):
            ranks.lead(lambda: require(False, "full"))
        with pytest.raises(UserError, match=r"^gone \(rank 1\)$"), ranks.together():
            require(me == 0, "gone")
        net, images = (
            build("small-cnn(width=2)", classes=10, channels=1).eval(),
            load_data("digits").test.take(list(range(70))),
        )
        attacks = [PGD(Linf(0.1), steps=2), FGSM(Linf(0.1))]
        shared = evaluate(net, images, attacks, batch_size=16, keep_examples=True)
        with ranks.alone():
            alone = evaluate(net, images, attacks, batch_size=16, keep_examples=True)
        for part in ("correct", "examples", "passes"):
            assert_same(getattr(shared, part), getattr(alone, part))
    end = pytest.raises(TrainingError, match=r"^rank 1: a damaged file$") if me == 0 else pytest.raises(UserError)
    with end, ranks.joined("cpu"):
        require(me == 0, "a damaged file")
        ranks.agree(False)


def test_ranks_meet_and_what_one_cannot_all_know():
    on_ranks(2, meet)


def lose_the_first() -> None:
    """Tell a lost rank, also where the lost one kept what others have said, from errors of one's own."""
    with ranks.joined("cpu"):
        own = torch.OutOfMemoryError("CUDA out of memory; connection")
        with pytest.raises(torch.OutOfMemoryError), ranks._noticing():
            raise own
        with pytest.raises(RuntimeError, match="no such operator") as raised, ranks._noticing():
            raise RuntimeError("no such operator")
        assert not isinstance(raised.value, TrainingError)
        ranks.agree(False)
    if dist.get_rank() == 0:
        os._exit(0)
    with pytest.raises(RankLost, match=r"^rank 1 has lost another rank"), ranks.joined("cpu"):
        ranks.agree(False)
    with pytest.raises(UserError, match=r"^my own$"), ranks.joined("cpu"):
        require(False, "my own")


def test_a_lost_first_rank_is_one_line():
    on_ranks(2, lose_the_first)


@pytest.mark.parametrize(("codes", "ends"), [((0, 0), 0), ((0, 1), 1), ((130, 0), 130), ((0, None), None)])
def test_a_command_that_is_stopped_says_how_its_processes_have_ended(
    codes: tuple[int | None, ...], ends: int | None, monkeypatch: pytest.MonkeyPatch
):
    def stopped(config: LaunchConfig, *_: str) -> Callable[..., None]:
        def run(*_: str) -> None:
            for number, code in enumerate(codes):
                monkeypatch.setenv("RANK", str(number))
                if code is not None:
                    note_end(code)
            assert config.shutdown_timeout == int(PATIENCE)
            raise SignalException("stopped", signal.SIGTERM)

        return run

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", PATIENCE)
    monkeypatch.setattr(launcher, "elastic_launch", stopped)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if ends is None:
        with pytest.raises(TrainingError, match=r"^rank 1 has not ended by itself; what was saved"):
            launch(["train"], 2)
    else:
        assert launch(["train"], 2) == ends


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_processes_trains_as_one_does_in_every_case(world: int, alone: Path, tmp_path: Path):
    on_ranks(world, lambda: [train_case(case, tmp_path) for case in CASES])
    for case in CASES:
        assert_near(train_case(case, alone).path, tmp_path / case)


@pytest.mark.slow
def test_a_run_that_is_stopped_after_every_step_goes_on_in_another_number_of_processes(alone: Path, tmp_path: Path):
    numbers = [2, 1, 3, 2, 4, 1, 2, 3, 1]
    cases = ("trades", "sglr", "generalist", "free", "atta", "pgi")
    for world in numbers:
        work = lambda: [train_case(case, tmp_path, time_budget=1e-6) for case in cases]  # noqa: E731
        on_ranks(world, work) if world > 1 else work()
    for case in cases:
        assert Run.read(tmp_path / case).finished
        assert_near(train_case(case, alone).path, tmp_path / case)


@pytest.mark.slow
def test_the_same_number_of_processes_gives_the_same_bits_stopped_or_not(shared: Path, tmp_path: Path):
    for _ in range(9):
        on_ranks(2, lambda: [train_case(case, tmp_path, time_budget=1e-6) for case in QUICK])
    for case in QUICK:
        assert_same_run(tmp_path / case, shared / case)


COMMAND = [
    sys.executable, "-m", "advalign", "train", "trades", "--data", "digits", "--model", "tests.training.on_ranks:toy",
    "--recipe", "digits", "--epochs", "20", "--steps", "1", "--subset", "200", "--name", "run", "--trust-model",
    "--sync-bn", "--checkpoint-seconds", "0", "--device", "cpu",
]  # fmt: skip


def children(parent: int) -> list[int]:
    """Return the processes that one has started."""
    return [int(each) for each in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_rank_and_a_stopped_command_end_in_one_line_and_go_on(ending: signal.Signals, tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*COMMAND, "--runs", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--devices", "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "run" / "state.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(children(process.pid)[1] if ending == signal.SIGKILL else process.pid, ending)
    output, _ = process.communicate(timeout=120)
    assert "Traceback" not in output
    if ending == signal.SIGKILL:
        assert process.returncode == 1
        assert "rank 1 was ended by SIGKILL; what was saved last is kept" in output
    else:
        assert process.returncode == 0
        assert "Stopped: SIGTERM arrived. Saved in" in output.replace("\n", " ")
    assert not Run.read(tmp_path / "run").finished
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert Run.read(tmp_path / "run").finished

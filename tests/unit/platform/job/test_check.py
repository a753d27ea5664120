"""What is refused before any actor starts, with the field to blame."""

from __future__ import annotations

import os

import pytest

from everstep.platform.job import check as checks
from everstep.platform.job.check import (
    check,
    checkpoint_folder,
    copies_of_state,
    copies_of_view,
    shared_memory,
    shared_memory_needed,
)
from everstep.platform.job.errors import SpecError
from everstep.platform.job.inspect_task import inspect_task
from everstep.platform.job.spec import JobSpec
from everstep.storage.errors import StoreDenied
from everstep.storage.stores.local import LocalStore

TASKS = '''
import torch
from torch import nn
import everstep as es

class Numbers:
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, i): return torch.tensor([float(i)])

class Tiny(es.Task):
    def model(self): return nn.Sequential(nn.Linear(1, 10), nn.BatchNorm1d(10), nn.Linear(10, 1))
    def dataset(self): return Numbers(self.args.get("count", 100))
    def loss(self, model, batch, ctx): return model(batch).mean()

class Tied(Tiny):
    def model(self):
        one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        two.weight = one.weight
        return nn.Sequential(one, two)

class NoParameters(Tiny):
    def model(self): return nn.ReLU()

class Half(Tiny):
    def model(self): return nn.Linear(2, 2).half()

class Lazy(Tiny):
    def model(self): return nn.LazyLinear(2)

class NoModule(Tiny):
    def model(self): return lambda x: x

class Values(Tiny):
    """Looks at its values while it is built, which the meta device cannot show."""
    def model(self):
        layer = nn.Linear(2, 2)
        if layer.weight.sum().item() > 1e9: raise RuntimeError
        return layer

class Corpus(Tiny):
    defaults = {"data": "text"}
    def dataset(self): raise FileNotFoundError(f"{self.args.data} does not exist")

class Blames(Tiny):
    defaults = {"data": "text", "width": 8}
    def model(self): raise ValueError("args.width: 8 is odd somehow")

class Raises(Tiny):
    def model(self): raise KeyError("secret spot")

class BadSample(Tiny):
    def sample(self, step, lane): return [10**6]
    def collate(self, samples): raise RuntimeError("cannot stack")

class Lbfgs(Tiny):
    def optimizer(self, params): return torch.optim.LBFGS(params)

class Partly(Tiny):
    def optimizer(self, params): return torch.optim.SGD(list(params)[1:], lr=0.1)

class Twice(Tiny):
    def optimizer(self, params):
        params = list(params)
        return [torch.optim.SGD(params, lr=0.1), torch.optim.Adam(params[:1])]

class Foreign(Tiny):
    def optimizer(self, params):
        return torch.optim.SGD([*params, nn.Parameter(torch.zeros(1))], lr=0.1)

class NoOptimizer(Tiny):
    def optimizer(self, params): return "AdamW"

class Two(Tiny):
    def optimizer(self, params):
        params = list(params)
        return [torch.optim.SGD(params[:2], lr=0.1), torch.optim.Adafactor(params[2:])]

class NoSchedule(Tiny):
    def schedule(self, step): return float("nan")

class NotATask: pass
'''

SMALL = 10 + 10 + 10 + 10 + 10 + 1  # weights, biases and norms of Tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("job")
    (path / "tasks.py").write_text(TASKS)
    (path / "broken.py").write_text("import no_such_module_here\n")
    return path


def spec(name="Tiny", **changes):
    return JobSpec.parse({"name": "tiny", "task": f"tasks.py:{name}", "steps": 10, **changes})


def refusal(folder, name, **changes):
    with pytest.raises(SpecError) as caught:
        inspect_task(spec(name, **changes), folder)
    return caught.value


def test_facts_of_a_task(folder):
    facts = inspect_task(spec(), folder)
    assert facts.parameters == SMALL
    assert facts.tensors == 6
    assert facts.samples == 100
    assert facts.optimizer == "AdamW"
    buffers = 10 * 4 + 10 * 4 + 8
    assert facts.state_bytes == SMALL * 12 + 6 * 4 + buffers
    assert facts.notes == ()


def test_tied_parameters_count_once(folder):
    assert inspect_task(spec("Tied"), folder).parameters == 16


def test_several_optimizers_and_notes(folder):
    facts = inspect_task(spec("Two"), folder)
    assert facts.optimizer == "SGD + Adafactor"
    assert "Adafactor is cut by whole tensors" in facts.notes[0]


def test_a_model_that_meta_cannot_build_is_built_with_a_note(folder):
    facts = inspect_task(spec("Values"), folder)
    assert facts.parameters == 6
    assert "meta device" in facts.notes[0]


@pytest.mark.parametrize(
    ("name", "field", "words"),
    [
        ("Missing", "task", "has no 'Missing'"),
        ("NotATask", "task", "not a subclass"),
        ("NoParameters", "task", "no trainable parameter"),
        ("Half", "task", "float16"),
        ("Lazy", "task", "lazy: weight, bias"),
        ("NoModule", "task", "model() returned function"),
        ("Corpus", "args.data", "text does not exist"),
        ("Blames", "args.width", "8 is odd somehow"),
        ("Raises", "task", "secret spot"),
        ("BadSample", "task", "cannot stack"),
        ("Lbfgs", "task", "optimizer LBFGS cannot be cut"),
        ("Partly", "task", "in no optimizer: 0.weight"),
        ("Twice", "task", "in two optimizers or groups: 0.weight"),
        ("Foreign", "task", "1 of the optimizer's parameters are not the model's"),
        ("NoOptimizer", "task", "optimizer() returned str"),
        ("NoSchedule", "task", "schedule(0) is nan"),
    ],
)
def test_a_task_that_cannot_run_is_refused(folder, name, field, words):
    error = refusal(folder, name)
    assert [p.field for p in error.problems] == [field]
    assert words in str(error)


def test_an_exception_in_the_task_shows_its_line(folder):
    assert 'raise KeyError("secret spot")' in str(refusal(folder, "Raises"))


def test_the_value_of_a_blamed_default_is_shown(folder):
    assert "args.width = 8" in str(refusal(folder, "Blames"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("nowhere.py:Tiny", "there is no file"),
        ("broken.py:Tiny", "no_such_module_here"),
        ("no.such.module:Tiny", "no module"),
    ],
)
def test_a_task_that_cannot_be_imported_is_refused(folder, task, words):
    with pytest.raises(SpecError) as caught:
        inspect_task(spec(task=task), folder)
    assert [(p.field, p.value) for p in caught.value.problems] == [("task", task)]
    assert words in str(caught.value)


def test_an_empty_data_set_is_refused(folder):
    error = refusal(folder, "Tiny", args={"count": 0})
    assert "the data set is empty" in str(error)


def test_data_and_model_are_refused_together(folder):
    (folder / "both.py").write_text(TASKS + "\nclass Both(Corpus):\n    def model(self): return 3\n")
    error = refusal(folder, "Both", task="both.py:Both")
    assert [p.field for p in error.problems] == ["args.data", "task"]


def test_the_check_runs_apart_and_never_imports_torch_here(folder, tmp_path):
    facts = check(spec(checkpoint={"to": str(tmp_path / "a" / "b")}), folder)
    assert facts.parameters == SMALL
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_task_that_prints_or_exits_is_reported(folder):
    (folder / "prints.py").write_text('print("{}")\n' + TASKS)
    assert check(spec(task="prints.py:Tiny"), folder).tensors == 6
    (folder / "dies.py").write_text('import os, sys\nprint("last words", file=sys.stderr)\nos._exit(3)\n')
    with pytest.raises(SpecError) as caught:
        check(spec(task="dies.py:Tiny"), folder, source="job.yaml")
    assert "job.yaml cannot run" in str(caught.value)
    assert "exit code 3" in str(caught.value)
    assert "last words" in str(caught.value)


def test_a_task_that_hangs_is_refused_in_time(folder):
    (folder / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(SpecError, match="did not end within 4 s"):
        check(spec(task="hangs.py:Tiny"), folder, timeout_s=4)


def test_the_jobs_environment_reaches_the_task(folder):
    (folder / "env.py").write_text("import os\nassert os.environ['SIZE'] == '7'\n" + TASKS)
    env = {"env_vars": {"SIZE": "7"}}
    assert check(spec(task="env.py:Tiny", runtime_env=env), folder).tensors == 6


def test_too_little_shared_memory_is_refused_with_the_numbers(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    job = spec()
    assert shared_memory(job, 6 << 20) == []
    (problem,) = shared_memory(job, 7 << 20)
    text = problem.render()
    assert "64.0 MiB free" in text
    assert "69.3 MiB (1.1 x 9 x 7.0 MiB of training state)" in text  # two ranks: 2 slots and 2 of parity, twice; 1
    assert "--shm-size=1g" in text
    assert "a larger ranks.min" in problem.fix
    (problem,) = shared_memory(spec(layout={"zero": 0}, ranks={"max": 4}, snapshot={"every": 1}), 15 << 20)
    assert "264.0 MiB (1.1 x 16 x 15.0 MiB" in problem.render()
    assert "layout.zero" in problem.fix


def test_no_shared_memory_at_all_is_refused(tmp_path):
    (problem,) = shared_memory(spec(), 1, tmp_path / "none")
    assert "No such file" in problem.render()


@pytest.mark.parametrize(
    ("ranks", "parity", "copies"),
    [
        (1, 1, 2.0),
        (2, 1, 2 + 2 / 1),
        (3, 0, 2.0),
        (3, 1, 2 + 2 / 2),
        (3, 2, 2 + 4 / 1),
        (8, 2, 2 + 4 / 6),
        (9, 1, 2 + 4 / 9 * 2 / 3 + 5 / 9 * 2 / 4),  # in groups of four and five
        (2, 2, 2 + 2 / 1),  # as much as two can carry
    ],
)
def test_parity_takes_its_share_of_two_versions(ranks, parity, copies):
    job = spec(ranks={"min": 1, "max": 9}, lanes=9, snapshot={"parity": parity})
    assert copies_of_view(job, ranks) == pytest.approx(copies)


def test_the_peak_is_two_layouts_of_the_dearest_view_and_a_slot():
    always = spec(ranks={"min": 3, "max": 8}, snapshot={"parity": 1, "every": 1})
    assert copies_of_state(always) == pytest.approx(2 * 3)  # of three ranks
    assert copies_of_state(spec(ranks={"min": 3, "max": 8}, snapshot={"every": 5})) == pytest.approx(2 * 3 + 1)
    with_checkpoints = spec(ranks={"min": 3, "max": 8}, snapshot={"every": 1}, checkpoint={"to": "runs"})
    assert copies_of_state(with_checkpoints) == pytest.approx(2 * 4)
    assert shared_memory_needed(always, 1000) == int(1.1 * 6 * 1000)


def test_shadows_need_a_segment_more_and_no_parity():
    job = spec(snapshot={"redundancy": "shadow", "every": 1}, checkpoint={"to": "runs"})
    assert copies_of_view(job, 1) == 3
    assert copies_of_state(job) == 8


def test_replicated_state_needs_more():
    job = spec(layout={"zero": 0}, snapshot={"every": 1})
    assert [copies_of_view(job, ranks) for ranks in (2, 3, 4)] == [4, 6, 8]
    assert copies_of_state(job) == 16
    assert copies_of_state(spec(layout={"zero": 0})) == 20  # each rank may seal what lies between two snapshots


def test_a_checkpoint_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (problem,) = checkpoint_folder(spec(checkpoint={"to": "file/runs"}), tmp_path)
    assert (problem.field, problem.value) == ("checkpoint.to", "file/runs")
    assert "Not a directory" in problem.why
    assert str(tmp_path / "file" / "runs") in problem.why


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_checkpoint_folder_without_rights_is_refused(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (problem,) = checkpoint_folder(spec(checkpoint={"to": str(closed)}), tmp_path)
    assert "Permission denied" in problem.why


def test_a_checkpoint_folder_that_cannot_be_written_is_refused(tmp_path):
    (problem,) = checkpoint_folder(spec(checkpoint={"to": "/proc/runs"}), tmp_path)
    assert "/proc/runs" in problem.why
    assert problem.fix
    assert checkpoint_folder(spec(checkpoint={"to": "runs"}), tmp_path) == []
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left of the look"


def test_a_store_that_cannot_write_exclusively_is_refused_before_the_start(tmp_path, monkeypatch):
    """The stores prove it where a folder is claimed; a run claims none itself."""

    def ignores(self, path):
        raise StoreDenied(f"{path}: this store ignores If-None-Match")

    monkeypatch.setattr(LocalStore, "claim_folder", ignores)
    (problem,) = checkpoint_folder(spec(checkpoint={"to": "runs"}), tmp_path)
    assert "ignores If-None-Match" in problem.why


def test_task_and_folder_are_refused_in_one_message(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError) as caught:
        check(spec("Missing", checkpoint={"to": str(tmp_path / "file" / "x")}), folder)
    assert [p.field for p in caught.value.problems] == ["task", "checkpoint.to"]


def test_a_folder_with_misleading_names_does_no_harm(folder, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')\n")
    monkeypatch.chdir(tmp_path)
    assert check(spec(), folder).tensors == 6

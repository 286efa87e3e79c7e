"""Shared by the tests: small configs, an in-process session, and one Ray cluster for those that need it.

Most tests run the real loop in this process through `LocalSession`, without Ray.
"""

import os
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs
import pytest
import torch

from hrm_lm.config import Config, load_config
from hrm_lm.data.collate import pad
from hrm_lm.data.loading import train_batches
from hrm_lm.data.prepared.writer import ShardWriter, write_meta
from hrm_lm.data.splits import Splits
from hrm_lm.data.tokenizer import SimpleTokenizer, Tokenizer
from hrm_lm.models.contract import EvalOptions
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.loop import train

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how often the controller looks at its workers
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # models this small only wait for a second one


def small_config(**overrides) -> Config:
    """A model of a few thousand parameters on one-digit sums; `a__b=1` sets `a.b`."""
    fields = {
        "model.d_model": 16, "model.n_heads": 2, "optim.warmup_steps": 3, "train.steps": 12, "train.batch_size": 8,
        "train.log_every": 1, "data.dataset": "synthetic", "data.synthetic.max_digits": 1, "data.val_fraction": 0.2,
        "ray.cpus_per_worker": 1,
    }  # fmt: skip
    return load_config(overrides=fields | {key.replace("__", "."): value for key, value in overrides.items()})


def batches_of(splits: Splits, config: Config, first: int = 0, rank: int = 0, world_size: int = 1, collate=pad):
    """The training batches of a worker, in the guide's layout unless told otherwise."""
    return train_batches(splits.train, splits.tokenizer, collate, config.train, first, rank, world_size)


def eval_options(batch_size: int = 64, **options) -> EvalOptions:
    return EvalOptions(**{"cycles": small_config().model.hrm.cycles, "batch_size": batch_size} | options)


DIGITS = SimpleTokenizer("0123456789+=")


def sums(n: int) -> list[tuple[str, str]]:
    return [(f"{a}+{a * a}", str(a + a * a)) for a in range(n)]


def write_prepared(
    folder: Path, train, val=(("1+1", "2"), ("2+2", "4")), shards: int = 3, tokenizer: Tokenizer = DIGITS
) -> Path:
    """A prepared dataset of text pairs, the way `ray_jobs.prepare` leaves it."""
    folder.mkdir(parents=True)
    fs, closed = pyarrow.fs.LocalFileSystem(), {"train": [], "val": []}
    for split, pairs, count in (("train", train, shards), ("val", val, 1)):
        for i in range(count):
            writer = ShardWriter(fs, str(folder), f"{split}-{i:05d}", tokenizer)
            writer.write([(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in pairs[i::count]])
            closed[split].append(writer.close())
    write_meta(fs, str(folder), tokenizer, closed)
    return folder


class LocalSession:
    """Runs the loop in this process and keeps every checkpoint in `folder`."""

    rank, world_size, device, display, event_folder = 0, 1, torch.device("cpu"), "lines", None

    def __init__(self, folder: Path, stop_at: int | None = None):
        self.folder, self.stop_at, self.reports = folder, stop_at, []
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def restored(self):
        yield max(self.folder.glob("step_*"), default=None)

    def new_folder(self) -> Path:
        path = self.folder / "new"
        path.mkdir()
        return path

    def report(self, metrics, checkpoint):
        checkpoint.rename(self.folder / f"step_{metrics['step']:06d}")
        self.reports.append(metrics)
        if self.stop_at == metrics["step"]:
            raise KeyboardInterrupt

    def last_weights(self) -> dict[str, torch.Tensor]:
        return load_model(max(self.folder.glob("step_*")))[0].state_dict()


def train_locally(config: Config, folder: Path, stop_at: int | None = None) -> LocalSession:
    session = LocalSession(folder, stop_at)
    with suppress(KeyboardInterrupt):
        session.outcome = train(config, session)
    return session


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two CPUs of Ray, shared by all tests that need a cluster."""
    import ray

    from hrm_lm.cluster.start import init_ray

    os.environ["HRM_LM_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # the workers' too
    init_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """`bucket(path)` is the URI of a path in an empty bucket; `bucket.fs` its file system."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    monkeypatch.setenv("HRM_LM_CACHE", str(tmp_path / "cache"))
    host, port = server.get_host_and_port()

    def uri(path):
        return f"s3://key:secret@bucket/{path}?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true&region=us-east-1"

    uri.fs, _ = pyarrow.fs.FileSystem.from_uri(uri("x"))
    uri.fs.create_dir("bucket")
    uri.fs.delete_dir_contents("bucket")  # moto keeps what an earlier server of this process held
    yield uri
    server.stop()


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    return tmp_path


@pytest.fixture
def command(in_folder, capsys):
    """Runs a command's main in this process, as a user would; returns exit code, stdout, stderr."""
    from hrm_lm.commands.main import run_command

    def run(main, *arguments):
        capsys.readouterr()
        try:
            code = run_command(lambda: main([str(a) for a in arguments]))
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return run

"""Stores are the same to the byte whatever encodes the rows: this process, two, or Ray on two machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.demonstrations.pool import PoolSource
from mtft.data.readers.sources import SourcePart
from mtft.data.store.build_store import build_store
from mtft.data.store.token_store import open_stores
from mtft.data.tokenize.ray_encode import RayEncoding, _versions
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection
from tests.data.store.ray_tokenizers import Dies, SaysWhere, made_as
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

ROOT = Path(__file__).parents[3]
MADE = tokenizer(TEMPLATES["chatml"])
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def rows(n):
    rng = np.random.default_rng(0)
    say = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))  # noqa: E731
    return [{"prompt": f"{i} {say(5, 30)}", "response": say(1, 12), "seen": i} for i in range(n)]


def recipe_of(tmp_path, path, backend="processes", workers=None):
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"path": "none"},
            "tasks": [{"name": name, "data": str(path)} for name in ("a", "b")],
            "train": {"steps": 1},
            "output": {"dir": str(tmp_path / "run")},
            "data": {"backend": backend, "workers": workers},
        }
    )


@pytest.fixture(scope="module")
def two_nodes():
    """Ray on two machines with one core each, joined by RAY_ADDRESS once for all tests of this file."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("RAY_ADDRESS", raising=False)
        node = {"num_cpus": 1, "object_store_memory": 80 << 20}
        # On a busy machine a node may not answer for seconds: Ray would take it for dead, and end what has joined it.
        patient = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 20}
        head = {**node, "include_dashboard": False, "_system_config": patient}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", cluster.address)
        with RayEncoding(None) as ray:
            yield ray
        cluster.shutdown()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("mtft.data.tokenize.parallel_encode.BLOCK_ROWS", 16)


def build(folder, path, *, made=MADE, bad_rows="skip", keys=None, **computed):
    """{file: bytes} of a store."""
    folder.mkdir()
    section = TaskSection(name="sums", data=str(path), **(keys or {}))
    parts = [SourcePart(path.name, str(path))]
    pool = PoolSource(section, parts) if section.shots else None
    options = {"max_length": 90, "too_long": "truncate_left", "bad_rows": bad_rows, "limit": None, "total": 300}
    build_store(folder, section, "train", parts, made, "f", **options, seed=3, pool=pool, **computed)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_without_ray_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_jsonl(tmp_path / "a.jsonl", rows(20))
    with pytest.raises(UserError) as caught:
        open_stores(recipe_of(tmp_path, path, "ray"), MADE, "train", cache_dir=tmp_path / "cache")
    assert (caught.value.where, caught.value.do) == ("data.backend: ray", "pip install 'mtft[ray]'")
    assert [file for file in (tmp_path / "cache" / "stores").iterdir() if file.is_dir()] == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there(tmp_path, monkeypatch, address):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    path = write_jsonl(tmp_path / "a.jsonl", rows(20))
    with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
        open_stores(recipe_of(tmp_path, path, "ray"), MADE, "train", cache_dir=tmp_path / "cache")


def test_workers_of_the_recipe_are_processes(tmp_path, monkeypatch):
    asked = []
    from mtft.data.store import build_store as module

    start = module.parallel_encode
    monkeypatch.setattr(module, "parallel_encode", lambda encoder, n: asked.append(n) or start(encoder, 1))
    path = write_jsonl(tmp_path / "a.jsonl", rows(20))
    for workers in (None, 3):
        recipe = recipe_of(tmp_path, path, "processes", workers)
        open_stores(recipe, MADE, "train", cache_dir=tmp_path / f"cache{workers}")
    assert asked == [1, 1, 3, 3]


@pytest.mark.slow
def test_every_backend_writes_the_same_bytes(tmp_path, two_nodes, small_blocks):
    """Templates, a system prompt and demonstrations travel; a bad row is skipped; blocks are encoded on both nodes."""
    data = rows(300)
    data[77] = {"prompt": "x", "response": ""}
    path = write_jsonl(tmp_path / "a.jsonl", data)
    keys = {"template": ("{{ prompt }}", "Q: {{ prompt }}"), "system": "be brief", "shots": {"n": 2}}
    one, two = (build(tmp_path / str(n), path, keys=keys, processes=n) for n in (1, 2))
    assert one == two
    assert json.loads(one["meta.json"])["stats"]["skipped"] == 1
    assert build(tmp_path / "ray", path, keys=keys, on_ray=two_nodes) == one
    with RayEncoding(1) as one_worker:
        assert build(tmp_path / "ray-1", path, keys=keys, on_ray=one_worker) == one
    where = tmp_path / "where"
    where.mkdir()
    saying = made_as(SaysWhere, folder=where, seconds=0.02)
    assert build(tmp_path / "said", path, made=saying, keys=keys, on_ray=two_nodes) == one
    workers = [file.name.split(".") for file in where.iterdir()]
    assert len({node for node, _ in workers}) == 2


@pytest.mark.slow
def test_a_wrong_row_gets_the_same_message(tmp_path, two_nodes, small_blocks):
    data = rows(60)
    data[41] = {"prompt": "x", "response": ""}
    broken = write_jsonl(tmp_path / "a.jsonl", data)
    data[41] = {"prompt": "{}" * 10, "response": "y", "seen": 41}
    endless = write_jsonl(tmp_path / "b.jsonl", data)
    template = {"template": "{% if prompt[0] == '{' %}{{ 'x' * 70000000 }}{% endif %}{{ prompt }}"}
    for path, keys in ((broken, {}), (endless, template)):
        said = []
        for kind, computed in {"1": {"processes": 1}, "2": {"processes": 2}, "ray": {"on_ray": two_nodes}}.items():
            with pytest.raises(UserError) as caught:
                build(tmp_path / f"{path.stem}{kind}", path, bad_rows="error", keys=keys, **computed)
            said.append(str(caught.value))
        assert said[0] == said[1] == said[2]
        assert f"{path.name}:42" in said[0]


@pytest.mark.slow
def test_a_worker_of_ray_that_dies_costs_time_not_the_build(tmp_path, two_nodes, small_blocks):
    data = rows(100)
    data[50]["prompt"] += " FATAL"
    dead = tmp_path / "dead"
    dead.mkdir()
    path = write_jsonl(tmp_path / "a.jsonl", data)
    expected = build(tmp_path / "one", path)
    assert build(tmp_path / "ray", path, made=made_as(Dies, folder=dead), on_ray=two_nodes) == expected
    assert len(list(dead.iterdir())) == 1


@pytest.mark.slow
def test_the_store_of_one_backend_is_the_other_ones(tmp_path, two_nodes):
    path = write_jsonl(tmp_path / "a.jsonl", rows(40))
    made = [
        open_stores(recipe_of(tmp_path, path, backend, workers), MADE, "train", cache_dir=tmp_path / "cache")
        for backend, workers in (("ray", None), ("processes", None), ("ray", 2), ("processes", 1))
    ]
    assert len({store.path for stores in made for store in stores}) == 2
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 2


@pytest.mark.slow
def test_a_worker_with_other_versions_is_refused(tmp_path, two_nodes, monkeypatch):
    """Its tokenizer or template engine may give other bytes."""
    monkeypatch.setattr("mtft.data.tokenize.ray_encode._versions", lambda: {**_versions(), "tokenizers": "0.1"})
    path = write_jsonl(tmp_path / "a.jsonl", rows(10))
    with pytest.raises(UserError, match=r"cluster has tokenizers [0-9.]*, the driver 0\.1: its") as caught:
        build(tmp_path / "ray", path, on_ray=two_nodes)
    assert caught.value.where == "data.backend: ray"

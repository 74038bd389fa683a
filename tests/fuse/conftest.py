import pytest

from tests.fuse import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A base and four adapters on it: two plain, one of another rank with rsLoRA and patterns, one on few modules."""
    root = tmp_path_factory.mktemp("tiny")
    base = tiny.base(root / "base")
    return {
        "base": base,
        "one": tiny.adapter(root / "one", base, 11),
        "two": tiny.adapter(root / "two", base, 12),
        "odd": tiny.adapter(
            root / "odd", base, 13, r=3, use_rslora=True, rank_pattern={"q_proj": 6}, alpha_pattern={"k_proj": 3}
        ),
        "few": tiny.adapter(root / "few", base, 14, target_modules=["v_proj"]),
        "root": root,
    }


@pytest.fixture(scope="session")
def single(folders):
    """Strong model, base and one expert in fp64. Models are frozen, so tests may share them."""
    return tiny.fused(tiny.weak(folders["base"], [folders["one"]]))


@pytest.fixture(scope="session")
def double(folders):
    return tiny.fused(tiny.weak(folders["base"], [folders["one"], folders["odd"]]))

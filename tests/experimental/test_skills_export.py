"""The export of skill LoRAs, split by split."""

import numpy as np
import pytest

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.common.errors import MergeError
from mtft.experimental.skills_export import export_skills
from tests.merge import golden as g


def parts_of(folder, module):
    found = read_adapter(folder).factors(module)
    return g.delta(found), 0 if found.bias_M is None else found.scale * found.bias_M


def test_skills_per_split(tmp_path):
    rng = np.random.default_rng(0)
    made = [LoraFactors(rng.normal(size=(2, 10)), rng.normal(size=(12, 2)), 2.0) for _ in range(2)]
    paths = [g.write(tmp_path / n, {"q": f}) for n, f in zip("ab", made)]
    logits = {"t": np.array([[30.0, -30.0], [-30.0, 30.0]]), "u": np.zeros((1, 2))}
    export_skills(paths, logits, tmp_path / "out")
    A = np.hstack([made[0].A_RN[:, :5], made[1].A_RN[:, 5:]])
    B = np.vstack([made[0].B_MR[:6], made[1].B_MR[6:]])
    np.testing.assert_allclose(parts_of(tmp_path / "out" / "t", "q")[0], 2 * B @ A, atol=1e-5)
    mean = 2 * (made[0].B_MR + made[1].B_MR) / 2 @ (made[0].A_RN + made[1].A_RN) / 2
    np.testing.assert_allclose(parts_of(tmp_path / "out" / "u", "q")[0], mean, atol=1e-5)
    for bad in ({"../t": np.zeros((1, 2))}, {"t": np.zeros((1, 3))}):
        with pytest.raises(MergeError, match="routing"):
            export_skills(paths, bad, tmp_path / "out2")

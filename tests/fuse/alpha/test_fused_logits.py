"""Golden values: mpmath, 40 digits. Mesh and fp64 as oracles of every solver."""

from dataclasses import replace

import pytest
import torch

from mtft.fuse.alpha.exponential_tilt import ExponentialTilt
from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.root_solver import matching_function, solve_root
from mtft.fuse.alpha.spec import FusionError, FusionSpec

A = ([2, 1, 0, -1, 0.5], [0.4, 1.6, 0.1, -0.8, 0.9], [1, 0.5, 0.2, -0.3, 0])
B = ([6, 0, -1, -1, -2], [2, 0, -0.5, 0, -1], [0, 0.5, 0.5, 0, 0])
C = ([0, 1.5, -0.5, 9, -1.5], [-1.5, -0.5, 9, -1.5, -3.5], [0.5, 0.5, -1, 1, 0])
SECOND = [1.2, 0.3, 1.4, -0.2, -0.5]
EXACT = FusionSpec(rtol=1e-11)
RULES = ("forward", "jeffreys", "paper", "paper_grid")
PRECISION = pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 2e-4)], ids=["fp64", "fp32"])


def fuse(strong, experts, base, spec=EXACT, dtype=torch.float64, **options):
    rows = [torch.tensor(x, dtype=dtype) for x in (strong, experts, base)]
    if spec.rtol < 1e-6 and dtype == torch.float32:
        spec = replace(spec, rtol=1e-4)
    return fuse_logits(rows[0][None], rows[1][:, None], rows[2][None], spec, **options)


def random_rows(rows=64, vocabulary=50, shift=1.0, seed=0, experts=1):
    generator = torch.Generator().manual_seed(seed)
    strong, base = (2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(experts, rows, vocabulary, generator=generator, dtype=torch.float64)
    return strong, base + shift * noise, base


def close(actual, expected, atol):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.tensor(expected).double(), atol=atol, rtol=0)


GOLDEN_A = {
    "forward": (0.935467876, 0.259357227, 0.263660904, [0.25106859, 0.45305863, 0.05424225, 0.01372574, 0.22790479]),
    "jeffreys": (0.946202745, 0.264743229, 0.269693506, [0.24800570, 0.45577369, 0.05386889, 0.01357286, 0.22877886]),
    "paper": (0.946786152, 0.265036720, 0.270023118, [0.24783988, 0.45592091, 0.05384858, 0.01356457, 0.22882605]),
    "paper_grid": (0.9, 0.241767384, 0.244169673, [0.26134471, 0.44400698, 0.05546989, 0.01423694, 0.22494148]),
}


@PRECISION
@pytest.mark.parametrize("rule", RULES)
def test_golden_a(rule, dtype, atol):
    alpha, g, h, p = GOLDEN_A[rule]
    fused = fuse(A[0], [A[1]], A[2], replace(EXACT, alpha_rule=rule), dtype)
    close(fused.alpha_NT, [[alpha]], atol)
    close(fused.kl_forward_N, [g], atol)
    close(fused.kl_reverse_N, [h], atol)
    close(fused.target_NT, [[0.2593572270]], atol)
    close(fused.target_reverse_NT, [[0.2750795087]], atol)
    close(fused.logprobs_NV.exp(), [p], atol)
    assert not fused.clipped_N.any()
    assert not fused.flat_N.any()


@PRECISION
def test_golden_a_fixed(dtype, atol):
    half = fuse(A[0], [A[1]], A[2], replace(EXACT, alpha_rule="fixed", alpha=0.5), dtype)
    close(half.kl_forward_N, [0.0770510667], atol)
    close(half.kl_reverse_N, [0.0745258236], atol)
    close(half.logprobs_NV.exp(), [[0.39074891, 0.33632071, 0.06790198, 0.02045168, 0.18457672]], atol)
    whole = fuse(A[0], [A[1]], A[2], replace(EXACT, alpha_rule="fixed"), dtype)
    close(whole.logprobs_NV.exp(), [[0.23299671, 0.46919776, 0.05198859, 0.01282023, 0.23299671]], atol)


@PRECISION
@pytest.mark.parametrize("rule", RULES)
def test_golden_b_is_clipped(rule, dtype, atol):
    fused = fuse(B[0], [B[1]], B[2], replace(EXACT, alpha_rule=rule), dtype)
    close(fused.alpha_NT, [[2.0]], atol)
    assert fused.clipped_N.all()
    close(fused.kl_forward_N, [0.00442190157], atol)
    close(fused.kl_reverse_N, [0.0188259881], atol)
    close(fused.target_NT, [[0.7855684799]], atol)
    close(fused.logprobs_NV.exp(), [[0.99996351, 1.6701091e-5, 2.2602469e-6, 1.6701091e-5, 8.3149837e-7]], atol)


@PRECISION
@pytest.mark.parametrize(
    "rule, alpha", [("forward", 0.722891046), ("jeffreys", 0.982655115), ("paper", 1.44377955), ("paper_grid", 1.4)]
)
def test_golden_c_has_two_minima(rule, alpha, dtype, atol):
    fused = fuse(C[0], [C[1]], C[2], replace(EXACT, alpha_rule=rule), dtype)
    close(fused.alpha_NT, [[alpha]], atol)
    close(fused.target_reverse_NT, [[8.566919259]], 10 * atol)


@PRECISION
@pytest.mark.parametrize(
    "weights, user, lam, alpha, p",
    [
        (
            "active",
            None,
            1.65845395,
            (0.93546788, 0.79956972),
            [0.29759056, 0.39001534, 0.14302540, 0.01501888, 0.15434982],
        ),
        ("uniform", None, 2, (0.93546788, 1.21431381), [0.30541233, 0.33907883, 0.22222947, 0.01478744, 0.11849193]),
        (
            "user",
            (0.3, 0.7),
            1.42857143,
            (0.4009148, 1.21431381),
            [0.44957069, 0.20116445, 0.25040117, 0.02063427, 0.07822941],
        ),
        ("onehot", None, 1, (0.93546788, 0), [0.25106859, 0.45305863, 0.05424225, 0.01372574, 0.22790479]),
    ],
)
def test_golden_many(weights, user, lam, alpha, p, dtype, atol):
    spec = replace(EXACT, alpha_rule="forward", weights=weights, user_weights=user)
    fused = fuse(A[0], [A[1], SECOND], A[2], spec, dtype)
    close(fused.scale_N, [lam], 2 * atol)
    close(fused.alpha_NT, [alpha], atol)
    close(fused.logprobs_NV.exp(), [p], atol)
    close(fused.target_NT, [[0.2593572270, 0.1707747903]], atol)


@pytest.mark.parametrize("rule", ["forward", "jeffreys", "reverse"])
def test_rows_on_which_plain_newton_runs_in_circles(rule):
    """A real row, gathered into four points: f is a steep sigmoid, and from below Newton lands above, and back."""
    target = torch.linspace(0.5, 14, 271, dtype=torch.float64)  # jeffreys: 8.5 to 9.2 never came to an end
    p = torch.tensor([0.84, 0.16, 0.00014, 7.29e-6], dtype=torch.float64).expand(len(target), -1)
    p = p / p.sum(-1, keepdim=True)
    d = torch.tensor([-2.11, 1.62, 6.44, 12.78], dtype=torch.float64).repeat(len(target), 1)
    a_max = torch.full_like(target, 2.0)
    tilt = ExponentialTilt(p.log(), p, d, a_max)
    step = solve_root(tilt, rule, target, a_max, 1e-4)
    reached = matching_function(rule, step.a_N, tilt(step.a_N))
    assert (((reached - target).abs() <= 1.01e-4 * target) | step.clipped_N).all()
    assert (~step.clipped_N).any()
    assert step.evaluations <= 16


@pytest.mark.parametrize("shift", [0.01, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("rule", ["forward", "jeffreys", "paper"])
def test_solver_against_a_mesh(rule, shift):
    """The mesh brackets the root; J of `paper` is at or below every point of the mesh and of the 0.1 grid."""
    strong, experts, base = random_rows(32, shift=shift)
    fused = fuse_logits(strong, experts, base, replace(EXACT, alpha_rule=rule))
    p, d = strong.log_softmax(-1), experts[0].log_softmax(-1) - base.log_softmax(-1)

    def kls(a_N):
        log_z = torch.logsumexp(p + a_N[:, None] * d, -1)
        tilted = p + a_N[:, None] * d - log_z[:, None]
        return (tilted.exp() * (tilted - p)).sum(-1), (p.exp() * (p - tilted)).sum(-1)

    c, reverse_c = fused.target_NT[:, 0], fused.target_reverse_NT[:, 0]
    alpha = fused.alpha_NT[:, 0]
    if rule == "paper":
        found = _objective(kls(alpha), c, reverse_c)
        for a in torch.linspace(0, 2, 401):
            assert (found <= _objective(kls(torch.full_like(alpha, a)), c, reverse_c) * (1 + 1e-9) + 1e-12).all()
        return
    target = c if rule == "forward" else c + reverse_c
    below, above = ((kls((alpha + step).clamp(0, 2))) for step in (-1e-4, 1e-4))
    pick = (lambda gh: gh[0]) if rule == "forward" else (lambda gh: gh[0] + gh[1])
    assert (pick(below) <= target).all()
    assert ((pick(above) >= target) | fused.clipped_N).all()


def _objective(kls, c, reverse_c):
    return (kls[0] - c) ** 2 + (kls[1] - reverse_c) ** 2


def test_paper_is_never_worse_than_its_grid_on_3000_rows():
    worst = -torch.inf
    for seed, shift in enumerate((0.1, 0.5, 1.0, 2.0, 4.0, 8.0)):
        rows = random_rows(500, 40, shift, seed)
        J = {}
        for rule in ("paper", "paper_grid"):
            fused = fuse_logits(*rows, FusionSpec(alpha_rule=rule))
            J[rule] = _objective(
                (fused.kl_forward_N, fused.kl_reverse_N), fused.target_NT[:, 0], fused.target_reverse_NT[:, 0]
            )
        worst = max(worst, float((J["paper"] - J["paper_grid"] * (1 + 1e-9)).max()))
    assert worst <= 1e-12


@pytest.mark.parametrize("rule", ["forward", "jeffreys"])
@pytest.mark.parametrize("vocabulary", [50, 32000, 128000])
def test_target_is_met(rule, vocabulary):
    strong, experts, base = (x.float() for x in random_rows(8, vocabulary))
    fused = fuse_logits(strong, experts, base, FusionSpec(alpha_rule=rule))
    target = fused.target_NT[:, 0] + (fused.target_reverse_NT[:, 0] if rule == "jeffreys" else 0)
    reached = fused.kl_forward_N + (fused.kl_reverse_N if rule == "jeffreys" else 0)
    open_N = ~fused.clipped_N
    assert open_N.any()
    assert ((reached - target).abs() <= 1.01e-4 * target)[open_N].all()


@pytest.mark.parametrize("scale", [2e-3, 1e-2, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("rule", ["forward", "jeffreys"])
def test_fp32_agrees_with_fp64(rule, scale):
    """From c = 4e-6, where plain logsumexp in fp32 loses all digits, to large shifts."""
    strong, experts, base = (x.float().double() for x in random_rows(8, 32000, scale, seed=5))
    spec = FusionSpec(alpha_rule=rule, rtol=1e-6)
    exact = fuse_logits(strong, experts, base, spec)
    single = fuse_logits(strong.float(), experts.float(), base.float(), spec)
    torch.testing.assert_close(single.alpha_NT, exact.alpha_NT, atol=2e-4, rtol=0)


def test_strong_equal_to_base_gives_the_expert():
    _, experts, base = random_rows()
    for rule, atol in (("forward", 1e-6), ("jeffreys", 1e-6), ("paper", 1e-4)):
        fused = fuse_logits(base, experts, base, FusionSpec(alpha_rule=rule, rtol=1e-12))
        torch.testing.assert_close(fused.alpha_NT, torch.ones_like(fused.alpha_NT), atol=atol, rtol=0)
        torch.testing.assert_close(fused.logprobs_NV, experts[0].log_softmax(-1), atol=50 * atol, rtol=0)


@pytest.mark.parametrize("rule", ["fixed", *RULES])
def test_expert_equal_to_base_changes_nothing(rule):
    strong, _, base = random_rows()
    for dtype in (torch.float64, torch.float32):
        rows = strong.to(dtype), base.to(dtype)[None], base.to(dtype)
        fused = fuse_logits(*rows, FusionSpec(alpha_rule=rule))
        torch.testing.assert_close(fused.logprobs_NV, rows[0].log_softmax(-1))
        assert fused.flat_N.all()
        if rule != "fixed":
            assert (fused.alpha_NT == 0).all()


def test_fixed_one_is_proxy_tuning():
    strong, experts, base = random_rows()
    fused = fuse_logits(strong, experts, base, FusionSpec(alpha_rule="fixed"))
    torch.testing.assert_close(fused.logprobs_NV, (strong + experts[0] - base).log_softmax(-1))
    two = random_rows(experts=2)
    fused = fuse_logits(*two, FusionSpec(alpha_rule="fixed", alpha=(0.5, 1.5)))
    mixed = two[0] + 0.5 * (two[1][0] - two[2]) + 1.5 * (two[1][1] - two[2])
    torch.testing.assert_close(fused.logprobs_NV, mixed.log_softmax(-1))


@pytest.mark.parametrize("rule", ["fixed", *RULES])
@pytest.mark.parametrize("weights", ["active", "uniform", "onehot"])
def test_symmetries(rule, weights):
    """Order of experts, order of the vocabulary and constant shifts of any logits don't matter; copies equal one."""
    strong, experts, base = random_rows(experts=3)
    spec = FusionSpec(alpha_rule=rule, weights=weights, rtol=1e-9)
    fused = fuse_logits(strong, experts, base, spec)
    again = fuse_logits(strong + 3, experts[[2, 0, 1]] - 7, base + 0.5, spec)
    torch.testing.assert_close(again.logprobs_NV, fused.logprobs_NV, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.alpha_NT, fused.alpha_NT[:, [2, 0, 1]], atol=1e-6, rtol=0)
    order = torch.randperm(strong.shape[1], generator=torch.Generator().manual_seed(1))
    again = fuse_logits(strong[:, order], experts[:, :, order], base[:, order], spec)
    torch.testing.assert_close(again.logprobs_NV, fused.logprobs_NV[:, order], atol=1e-6, rtol=0)
    one = fuse_logits(strong, experts[:1], base, spec)
    copies = fuse_logits(strong, experts[:1].expand(4, -1, -1), base, spec)
    torch.testing.assert_close(copies.logprobs_NV, one.logprobs_NV, atol=1e-6, rtol=0)


def test_no_expert_goes_past_its_own_step():
    rows = random_rows(200, experts=4, seed=3)
    for weights in ("active", "uniform"):
        spec = FusionSpec(alpha_rule="forward", weights=weights)
        joint = fuse_logits(*rows, spec).alpha_NT
        own = torch.cat([fuse_logits(rows[0], expert[None], rows[2], spec).alpha_NT for expert in rows[1]], -1)
        assert (joint <= own * (1 + 1e-9)).all()


def test_alpha_scales_inversely_with_the_direction():
    """Solver alone: alpha(k d, same target) = alpha / k."""
    strong, experts, base = random_rows()
    logp, d = strong.log_softmax(-1), experts[0] - base
    target, a_max = torch.full((len(d),), 0.05, dtype=torch.float64), torch.full((len(d),), 9.0, dtype=torch.float64)
    once, twice = (
        solve_root(ExponentialTilt(logp, logp.exp(), k * d, a_max), "jeffreys", target, a_max, 1e-12).a_N
        for k in (1.0, 2.0)
    )
    torch.testing.assert_close(twice, once / 2, atol=1e-6, rtol=0)


def test_impossible_tokens_stay_impossible_and_clamps_are_counted():
    strong, experts, base = random_rows(4)
    strong[:, 0] = -torch.inf
    experts[0, :, 1] = -torch.inf  # the expert forbids id 1
    base[:, 2] = experts[0, :, 2] = -torch.inf  # both forbid id 2: no opinion
    for dtype in (torch.float64, torch.float32):
        for rule in ("fixed", *RULES):
            fused = fuse_logits(strong.to(dtype), experts.to(dtype), base.to(dtype), FusionSpec(alpha_rule=rule))
            assert (fused.logprobs_NV[:, 0] == -torch.inf).all()
            assert fused.logprobs_NV[:, 1:].isfinite().all()
            assert (fused.clamped_N == 1).all()
            torch.testing.assert_close(fused.logprobs_NV.exp().sum(-1), torch.ones(4, dtype=dtype), atol=1e-5, rtol=0)


def test_hot_rows_agree_with_fp64():
    """Shifts so large that e^{a d} overflows fp32."""
    strong, experts, base = random_rows(16, 200, 12.0, seed=2)
    for rule in ("fixed", "forward", "jeffreys"):
        exact = fuse_logits(strong, experts, base, FusionSpec(alpha_rule=rule))
        single = fuse_logits(strong.float(), experts.float(), base.float(), FusionSpec(alpha_rule=rule))
        torch.testing.assert_close(single.alpha_NT, exact.alpha_NT, atol=2e-4, rtol=0)
        torch.testing.assert_close(single.logprobs_NV.double().exp(), exact.logprobs_NV.exp(), atol=1e-3, rtol=0)


def test_nan_names_model_and_row():
    strong, experts, base = random_rows(4)
    broken = experts.clone()
    broken[0, 2, 7] = torch.nan
    with pytest.raises(FusionError, match=r"expert 0 .* row 2 of 4"):
        fuse_logits(strong, broken, base, FusionSpec())
    with pytest.raises(FusionError, match="the strong model"):
        fuse_logits(strong * torch.nan, experts, base, FusionSpec())


def test_ids_beyond_the_small_vocabulary_are_not_shifted():
    strong, experts, base = random_rows(8, 50)
    fused = fuse_logits(strong, experts[..., :40], base[..., :40], FusionSpec())
    moved = fused.logprobs_NV - strong.log_softmax(-1)
    torch.testing.assert_close(moved[:, 40:], moved[:, 40:41].expand(-1, 10))
    torch.testing.assert_close(
        fused.target_NT, fuse_logits(strong[..., :40], experts[..., :40], base[..., :40], FusionSpec()).target_NT
    )


def test_plausibility_drops_what_the_strong_model_finds_absurd():
    strong, experts, base = random_rows(8)
    p = strong.softmax(-1)
    fused = fuse_logits(strong, experts, base, FusionSpec(plausibility=0.1))
    allowed = p >= 0.1 * p.amax(-1, keepdim=True)
    assert torch.equal(fused.logprobs_NV.isfinite(), allowed)
    torch.testing.assert_close(fused.logprobs_NV.exp().sum(-1), torch.ones(8, dtype=torch.float64))


def test_weights_per_row():
    strong, experts, base = random_rows(2, experts=2)
    onehot = torch.eye(2, dtype=torch.float64)
    fused = fuse_logits(strong, experts, base, FusionSpec(weights="router"), weights_NT=onehot)
    for row in range(2):
        one = fuse_logits(strong[[row]], experts[[row]][:, [row]], base[[row]], FusionSpec())
        torch.testing.assert_close(fused.logprobs_NV[row], one.logprobs_NV[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha_rule": "jefreys"}, "did you mean 'jeffreys'"),
        ({"alpha": 11}, "alpha is 11"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"weights": "user"}, "without user_weights"),
        ({"weights": "user", "user_weights": (0.5, 0.6)}, "add up to 1.1"),
        ({"weights": "user", "user_weights": (-0.5, 1.5)}, "negative"),
    ],
)
def test_refused(options, message):
    with pytest.raises(FusionError, match=message):
        FusionSpec(**options)


def test_vector_of_the_wrong_length():
    with pytest.raises(FusionError, match="2 entries for 1 experts"):
        fuse_logits(*random_rows(2), FusionSpec(alpha_rule="fixed", alpha=(1.0, 1.0)))

"""What the public functions cannot take: one line that says what is needed and what came."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gc_nc import metrics, transfer

KEY, X = jax.random.key(0), np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3)
Z, LABELS = np.array([[0.0, 0], [2, 0], [10, 0], [12, 0]]), np.array([0, 0, 1, 1])
EMBED = jax.tree_util.Partial(jnp.sin)
PARAMS = {"w": jnp.ones(3)}
EPISODES = (np.zeros((1, 2), int), np.zeros((1, 2, 1), int), np.zeros((1, 2, 1), int))


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    """Without the tests' type checks, which would come first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class OnAGpu:
    """As tensors of other libraries are, which NumPy cannot read."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("copy it\nto the host")


def statistics():
    return metrics.update_class_statistics(metrics.init_class_statistics(2, 2), Z, LABELS)


def loss(params):
    return jnp.sum(params["w"] ** 2)


def estimate(**options):
    options = {"key": KEY} | options
    return metrics.estimate_geometric_complexity(EMBED, X, **options)


def update(embeddings=Z, labels=LABELS, weights=None):
    stats = metrics.init_class_statistics(2, 2)
    return metrics.update_class_statistics(stats, embeddings, labels, weights=weights)


def sample(**options):
    options = {"num_ways": 2, "num_shots": 1, "num_queries": 1, "labels": LABELS} | options
    return transfer.sample_episode(options.pop("key", KEY), **options)


def tune(**options):
    options = {
        "embed_fn": lambda params, x: x * params["w"],
        "support_inputs": np.ones((2, 1, 3), np.float32),
        "num_steps": 1,
        "learning_rate": 0.1,
    } | options
    embed_fn, support = options.pop("embed_fn"), options.pop("support_inputs")
    return transfer.fine_tune_predictions(embed_fn, PARAMS, support, X, **options)


def accuracies(head="nearest_mean", labels=LABELS, episodes=None):
    episodes = sample_all() if episodes is None else episodes
    return transfer.episode_accuracies(Z, labels, episodes, head)


def sample_all():
    return transfer.sample_episodes(KEY, LABELS, 2, num_ways=2, num_shots=1, num_queries=1)


def of_whole_number(name):
    """The functions that take a number of this name, given it."""
    return {
        "num_probes": (
            lambda n: estimate(num_probes=n),
            lambda n: metrics.hessian_trace(loss, PARAMS, KEY, num_probes=n),
            lambda n: metrics.geometric_complexity_with_outputs(
                lambda x: (x, ()), X, KEY, num_probes=n
            ),
        ),
        "chunk_size": (
            lambda n: metrics.squared_jacobian_norms(EMBED, X, chunk_size=n),
            lambda n: metrics.geometric_complexity(EMBED, X, chunk_size=n),
            lambda n: estimate(chunk_size=n),
        ),
        "num_iterations": (
            lambda n: metrics.hessian_top_eigenvalue(loss, PARAMS, KEY, num_iterations=n),
        ),
        "num_classes": (
            lambda n: metrics.init_class_statistics(n, 2),
            lambda n: metrics.class_geometric_complexity(np.ones(4), LABELS, n),
            lambda n: metrics.nearest_mean_error_bound(0.1, n),
        ),
        "embedding_dim": (lambda n: metrics.init_class_statistics(2, n),),
        "num_shots": (
            lambda n: metrics.nearest_mean_error_bound(0.1, 2, n),
            lambda n: sample(num_shots=n),
        ),
        "num_ways": (lambda n: sample(num_ways=n),),
        "num_steps": (lambda n: tune(num_steps=n),),
        "most_active": (
            lambda n: metrics.geometric_complexity(EMBED, X, skip_inactive=True, most_active=n),
        ),
        "num_pilot": (lambda n: metrics.geometric_complexity_to_error(EMBED, X, KEY, num_pilot=n),),
        "max_products": (
            lambda n: metrics.geometric_complexity_to_error(EMBED, X, KEY, max_products=n),
        ),
        "num_queries": (lambda n: sample(num_queries=n),),
    }[name]


WHOLE = (
    *("num_probes", "chunk_size", "num_iterations", "num_classes", "embedding_dim", "num_shots"),
    *("num_ways", "num_steps", "most_active", "num_pilot", "max_products", "num_queries"),
)


@pytest.mark.parametrize("name", WHOLE)
def test_e10_one_kind_of_line_for_every_whole_number(name):
    for call in of_whole_number(name):
        for value in (2.5, "3", np.array([2]), np.float32(2), True, np.bool_(True), None):
            if value is None and name in ("chunk_size", "num_shots", "most_active", "max_products"):
                continue
            with pytest.raises(ValueError, match=f"^{name}=.* must be a whole number") as error:
                call(value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [jnp.int32, np.int64, np.uint8])
def test_whole_numbers_of_numpy_and_jax_are_taken(make):
    expected = estimate(num_probes=2, chunk_size=3)
    assert estimate(num_probes=make(2), chunk_size=make(3)) == expected
    assert metrics.init_class_statistics(make(3), make(2)).means.shape == (3, 2)
    assert sample(num_ways=make(2)).classes.shape == (2,)
    assert metrics.nearest_mean_error_bound(0.001, make(2), make(5)) < 1


def test_a_number_that_is_traced_is_refused():
    for call in (lambda n: estimate(num_probes=n), lambda n: sample(num_shots=n)):
        with pytest.raises(ValueError, match="is traced; a whole number that is known outside jit"):
            jax.jit(call)(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # Statistics.
        (lambda: metrics.neural_collapse(Z), "stats is float64 of shape .4, 2.; ClassStatistics"),
        (lambda: metrics.cdnv_matrix(None), "stats is None; ClassStatistics"),
        (lambda: metrics.nc1(jnp.ones(3)), "stats is float32 of shape .3,.; ClassStatistics"),
        (lambda: metrics.nc2({}), "stats is a dict; ClassStatistics are needed"),
        (lambda: metrics.nc3((), np.ones((2, 2))), "stats is a tuple; ClassStatistics"),
        (lambda: metrics.nc4(LABELS, statistics(), Z), "stats is float64 of shape"),
        (lambda: metrics.nearest_class_mean(statistics(), Z), "stats is float64 of shape"),
        (lambda: metrics.geometric_collapse(statistics(), 1.0), "gc is a ClassStatistics; an arr"),
        (lambda: metrics.geometric_collapse(1.0, 1.0), "stats is 1.0; ClassStatistics"),
        (lambda: metrics.merge_class_statistics(statistics(), Z), "^b is float64 of shape"),
        (lambda: metrics.update_class_statistics(Z, Z, LABELS), "stats is float64 of shape"),
        (lambda: metrics.poincare_constant(np.ones(2), np.ones(2)), "stats is float64 of shape"),
        # Arrays.
        (lambda: metrics.geometric_complexity(EMBED, {"x": X}), "inputs are a dict; an array"),
        (
            lambda: metrics.squared_jacobian_norms(EMBED, None),
            "inputs are None; an array of numbers",
        ),
        (lambda: metrics.squared_jacobian_norms(EMBED, "x"), "inputs are .*; an array of numbers"),
        (
            lambda: metrics.squared_jacobian_norms(EMBED, [[1.0], [1.0, 2]]),
            "inputs are a list; an array",
        ),
        (
            lambda: metrics.squared_jacobian_norms(EMBED, jax.random.split(KEY)),
            r"inputs are key<fry> of shape \(2,\); an array",
        ),
        (lambda: metrics.geometric_complexity_to_error(EMBED, {}, KEY), "inputs are a dict"),
        (lambda: update(embeddings={"z": Z}), "embeddings are a dict; an array of numbers"),
        (lambda: update(weights="all"), "weights are .*; an array of numbers"),
        (lambda: transfer.nearest_mean_predictions({}, Z), "support_embeddings are a dict"),
        (lambda: transfer.transform_features(None), "embeddings are None"),
        (lambda: transfer.mean_confidence_interval({}), "accuracies are a dict"),
        (lambda: update(embeddings=OnAGpu()), r"embeddings are an OnAGpu.*\(copy it to the host\)"),
        (lambda: metrics.squared_jacobian_norms(EMBED, np.ma.masked_less(X, 0.5)), "are masked in"),
        (lambda: update(embeddings=np.zeros((0, 3))), r"embeddings of shape \(0, 3\)"),
        (lambda: metrics.squared_jacobian_norms(EMBED, np.zeros((0, 3))), "have no examples"),
        # Words.
        (lambda: estimate(method=np.ones(3)), r"method=float64 of shape \(3,\) is not one of outp"),
        (
            lambda: metrics.geometric_complexity_interval(
                X[0], value_range=2, method=["hoeffding"]
            ),
            "method=a list is not one of hoeffding, empirical_bernstein",
        ),
        (lambda: metrics.init_class_statistics(2, 2, scatter="no"), "scatter='no'; True or False"),
        (lambda: transfer.transform_features(Z, l2="none"), "l2='none'; True or False is needed"),
        (lambda: transfer.transform_features(Z, l2=Z[0]), "l2=float64 of shape .2,.; True or"),
        # Parameters.
        (lambda: metrics.hessian_trace(loss, {"w": "abc"}, KEY), r"params\['w'\] is 'abc'; a pytr"),
        (lambda: metrics.sam_sharpness(loss, OnAGpu()), "params is an OnAGpu; a pytree of arrays"),
        (
            lambda: metrics.squared_gradient_norm(loss, {"w": np.array(["a"])}),
            r"params\['w'\] is <U1 of shape \(1,\); a pytree of arrays of numbers",
        ),
        (lambda: tune(report=3), "report is 3; a function"),
        # Keys.
        (lambda: estimate(key=0), r"key is 0; one random key is needed, as in jax.random.key\(0\)"),
        (lambda: estimate(key=None), "key is None; one random key"),
        (lambda: estimate(key=jax.random.split(KEY)), r"key is key<fry> of shape \(2,\); one"),
        (lambda: estimate(key=np.zeros(2)), r"key is float64 of shape \(2,\); one random key"),
        (lambda: metrics.hessian_trace(loss, PARAMS, 0), "key is 0; one random key"),
        (lambda: metrics.hessian_top_eigenvalue(loss, PARAMS, 0), "key is 0; one random key"),
        (lambda: metrics.geometric_complexity_to_error(EMBED, X, 0), "key is 0; one random key"),
        (lambda: sample(key=0), "key is 0; one random key"),
        # Functions.
        (lambda: metrics.squared_jacobian_norms(PARAMS, X), "embed_fn is a dict; a function"),
        (lambda: metrics.squared_gradient_norm(PARAMS, PARAMS), "loss_fn is a dict; a function"),
        (lambda: tune(embed_fn=None), "embed_fn is None; a function"),
        (lambda: accuracies(head=3), "head is 3; a function"),
        # Labels.
        (lambda: update(labels=LABELS[:, None]), r"labels of shape \(4, 1\).* labels\[:, 0\]"),
        (lambda: update(labels=np.eye(2)[LABELS]), r"labels of shape \(4, 2\).*argmax\(axis=1\)"),
        (lambda: update(labels=LABELS / 1), "labels are float64; integers in 0..1 are needed"),
        (lambda: update(labels=None), "labels are None; an array of numbers is needed"),
        (
            lambda: metrics.class_geometric_complexity(np.ones(4), np.eye(2)[LABELS], 2),
            r"labels of shape \(4, 2\).*argmax",
        ),
        (
            lambda: metrics.geometric_complexity_to_error(EMBED, X, KEY, labels=LABELS[:, None]),
            r"labels of shape \(4, 1\) for 4 examples; \(4,\) integers are needed",
        ),
        (lambda: accuracies(labels=LABELS / 1), "labels are float64; integers are needed"),
        (lambda: sample(labels=np.eye(2)[LABELS]), "labels are float64 of shape"),
        # Numbers.
        (
            lambda: metrics.geometric_complexity_to_error(EMBED, X, KEY, relative_error="1%"),
            "relative_error='1%' must be above 0",
        ),
        (
            lambda: metrics.geometric_complexity_interval(X[0], value_range=2, delta="0.1"),
            "delta='0.1' must be between 0 and 1",
        ),
        (lambda: tune(momentum=None), "momentum=None must be in"),
        (lambda: tune(momentum=KEY), r"momentum=key<fry> of shape \(\) must be in"),
        (lambda: tune(momentum=[[1.0], 2]), "momentum=a list must be in"),
        (lambda: estimate(num_probes=statistics()), "num_probes=a ClassStatistics must be a whole"),
        (lambda: tune(learning_rate="0.1"), "learning_rate is '0.1'; an array of numbers"),
        (lambda: metrics.sam_sharpness(loss, PARAMS, rho=None), "rho is None"),
        # Heads.
        (
            lambda: accuracies(head=lambda s, q: jnp.ones((len(q), 2))),
            r"head returned float32 of shape \(2, 2\) for 2 queries; \(2,\) integers.*argmax",
        ),
        (lambda: accuracies(head=lambda s, q: None), "head returned None for 2 queries"),
        (lambda: accuracies(head=lambda s, q: (q, q)), "head returned a tuple for 2 queries"),
        (lambda: accuracies(head=lambda s, q: q[:, 0]), r"head returned float32 of shape \(2,\)"),
        (
            lambda: accuracies(functools.partial(transfer.ridge_predictions, regularization=0)),
            "regularization=0 must be above 0 and finite",
        ),
        (
            lambda: accuracies(functools.partial(transfer.ridge_predictions, regularization=-1.0)),
            "regularization=-1.0 must be",
        ),
        (lambda: accuracies(episodes=Z), "episodes are float64 of shape .*sample_episodes"),
        (lambda: accuracies(episodes=EPISODES[:2]), "episodes are a tuple; take them from"),
    ],
)
def test_e11_what_was_expected_and_what_came(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_embedding_of_so_many_rows_only():
    def of_40(x):
        return x.reshape(40, 3)

    def counts(x):
        assert x.shape[0] == 40
        return x

    x = jnp.ones((40, 3))
    for embed in (of_40, counts, jax.tree_util.Partial(of_40)):
        with pytest.raises(
            ValueError, match=r"embed_fn fails for 20 examples .*chunk_size"
        ) as error:
            metrics.geometric_complexity(embed, x)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="embed_fn fails for 8 examples"):
            metrics.estimate_geometric_complexity(embed, x[:8], KEY)
        assert metrics.geometric_complexity(embed, x, chunk_size=40) == 3


def test_old_keys_draw_what_new_ones_do():
    old = jax.random.PRNGKey(3)
    new = jax.random.key(3)
    assert estimate(key=old) == estimate(key=new)
    assert estimate(key=np.asarray(old)) == estimate(key=new)
    jax.tree.map(np.testing.assert_array_equal, sample(key=old), sample(key=new))


def test_lists_and_other_arrays_are_taken():
    assert metrics.geometric_complexity(EMBED, X.tolist()) == metrics.geometric_complexity(EMBED, X)
    stats = update(Z.tolist(), LABELS.tolist(), [1, 1, 1, 1])
    assert metrics.neural_collapse(stats) == metrics.neural_collapse(statistics())

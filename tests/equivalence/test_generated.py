"""Masked ≡ pruned on functional models that hypothesis makes up."""

import keras
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfprune.testing import check_surgery
from tfprune.testing.strategies import draw_model

# Models are slow to build: no deadline, and the same examples in every run, so that CI's answer
# does not depend on luck.
PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
@PROFILE
@given(data=st.data(), ratio=st.sampled_from([0.25, 0.5, 0.75]), seed=st.integers(0, 99))
def test_masked_equals_pruned(data, ratio, seed):
    model = draw_model(data.draw)
    # A handful of float32 layers: 1e-5 of the largest output is some hundred roundings.
    check_surgery(model, ratio=ratio, seed=seed, tolerance=1e-5)
    keras.backend.clear_session(free_memory=False)

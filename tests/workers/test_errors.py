"""Exceptions carry their parts, and keep them between processes."""

import pickle

import pytest

from workers.errors import (
    ConfigError,
    CrashedError,
    GroupError,
    OverloadedError,
    ReplicaUnavailableError,
    RequestError,
    TramontaneError,
)


def test_what_is_wrong_comes_before_what_to_do():
    error = ConfigError("Port 80 is in use.", remedy="Choose another with --port.", param="--port")
    assert (error.message, error.remedy, error.param) == (
        "Port 80 is in use.",
        "Choose another with --port.",
        "--port",
    )
    assert str(error) == "Port 80 is in use. Choose another with --port."


@pytest.mark.parametrize(
    "error",
    [
        TramontaneError("It failed."),
        ConfigError("Wrong.", remedy="Mend it.", param="--x"),
        RequestError("Wrong.", param="top_p", code="invalid_value"),
        GroupError("Silent.", ranks=(1, 2)),
        CrashedError("Crashed.", num_crashes=3, alone=True),
        ReplicaUnavailableError("Gone.", crashed=True),
        OverloadedError("Full.", retry_after_s=4),
    ],
)
def test_an_exception_arrives_whole_in_another_process(error: TramontaneError):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)

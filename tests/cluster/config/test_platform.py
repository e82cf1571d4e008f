"""Which platform an environment shows, and what it wants. The environments are those that the platforms document."""

import pytest

from cluster.config.platform import PLATFORMS, recognize
from workers.errors import ConfigError

VERTEX = {
    "AIP_HTTP_PORT": "8080",
    "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
    "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    "AIP_STORAGE_URI": "gs://caip-tenant/model",
}


def folders(*names):
    return lambda folder: folder in names


def test_an_ordinary_machine_is_no_platform():
    # PORT is set on many machines, and SageMaker's notebooks have its region and an empty /opt/ml/model.
    environ = {"PORT": "80", "HOME": "/root", "AWS_REGION": "us-east-1", "SAGEMAKER_APP_TYPE": "JupyterLab"}
    assert recognize(environ, has_files=folders()) is None


def test_a_training_job_serves_nobody():
    environ = {"SM_TRAINING_ENV": "{}", "SM_MODEL_DIR": "/opt/ml/model", "SM_NUM_GPUS": "4"}
    assert recognize(environ, has_files=folders("/opt/ml/model")) is None


def test_sagemaker_with_a_model_that_it_unpacked():
    found = recognize({"AWS_REGION": "eu-west-1"}, has_files=folders("/opt/ml/model"))
    assert found is not None
    assert (found.name, found.port, found.model) == ("sagemaker", 8080, "/opt/ml/model")
    assert found.arguments == ["--host", "0.0.0.0", "--port", "8080", "--public-health"]
    assert str(found) == "Amazon SageMaker (there is /opt/ml/model): POST /invocations, GET /ping"


def test_sagemakers_variables_are_options_of_serve():
    environ = {
        "SAGEMAKER_BIND_TO_PORT": "8083",
        "SM_NUM_GPUS": "4",
        "SM_TRAMONTANE_MODEL": "mistralai/Mistral-7B-v0.1",
        "SM_TRAMONTANE_MAX_MODEL_LEN": "8192",
        "SM_TRAMONTANE_STRICT": "true",
        "SM_TRAMONTANE_NO_BATCHES": "False",
    }
    found = recognize(environ, has_files=folders("/opt/ml/model"))
    assert found is not None
    assert (found.port, found.model) == (8083, "mistralai/Mistral-7B-v0.1")
    assert found.options == ("--tensor-parallel-size", "4", "--max-model-len", "8192", "--strict")


def test_vertex():
    found = recognize(VERTEX)
    assert found is not None
    assert (found.name, found.port, found.model) == ("vertex", 8080, "gs://caip-tenant/model")
    assert found.ready_path == VERTEX["AIP_HEALTH_ROUTE"]
    assert found.predict_path == VERTEX["AIP_PREDICT_ROUTE"]
    without = recognize(VERTEX | {"AIP_STORAGE_URI": "", "HF_MODEL_ID": "a/b"})
    assert without is not None and without.model == "a/b"


def test_hugging_face_and_baseten():
    found = recognize({}, has_files=folders("/repository"))
    assert found is not None
    assert (found.name, found.port, found.model, found.ready_path) == ("huggingface", 8000, "/repository", "/health")
    named = recognize({"PORT": "8080"}, asked="baseten")
    assert named is not None
    assert (named.title, named.port, named.model) == ("Baseten", 8080, None)


def test_a_named_platform_wins_and_none_is_none():
    assert recognize(VERTEX, asked="none", has_files=folders("/repository", "/opt/ml/model")) is None
    for name in PLATFORMS:
        found = recognize(VERTEX, asked=name)
        assert found is not None and found.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AIP_HTTP_PORT": "http"}, "AIP_HTTP_PORT is 'http', which is not a port."),
        ({"AIP_HTTP_PORT": "70000"}, "Set it to 1 to 65535."),
        ({"AIP_PREDICT_ROUTE": "predict"}, "AIP_PREDICT_ROUTE is 'predict', which is not a path."),
        ({"AIP_HEALTH_ROUTE": "/{x}"}, "Write it like /predict."),
    ],
)
def test_what_cannot_work_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        recognize(VERTEX | change)

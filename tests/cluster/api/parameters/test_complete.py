"""Every field of every request body has a row in the tables of this folder, and every row is of a field that exists."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from support.clients.api_fields import fields_of, owned_name

from cluster.api.endpoints.endpoint import Endpoint
from cluster.api.endpoints.table import ENDPOINTS


def load_tables() -> Iterator[ModuleType]:
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        if file.name != Path(__file__).name:
            spec = importlib.util.spec_from_file_location(f"table_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            yield module


TABLES = list(load_tables())
# Azure's paths lead to handlers that are in the table already.
WITH_BODY = [e for e in ENDPOINTS if (e.body is not None or e.form is not None) and not e.path.startswith("/openai/")]


def test_every_field_of_every_struct_has_a_row() -> None:
    fields = {name for e in WITH_BODY for name in fields_of(e.body or e.form)}
    rows = {name for table in TABLES for row in table.ROWS for name in row.fields}
    assert fields - rows == set(), "these fields of request bodies have no row"
    assert rows - fields == set(), "these rows are of fields that no request body has"


@pytest.mark.parametrize("endpoint", WITH_BODY, ids=lambda e: e.path)
def test_every_endpoint_has_a_row_for_each_field_of_its_body(endpoint: Endpoint) -> None:
    kind = endpoint.body or endpoint.form
    assert kind is not None
    fields = {owned_name(kind, field.name) for field in msgspec.structs.fields(kind)}
    rows = {name for table in TABLES if endpoint.path in table.PATHS for row in table.ROWS for name in row.fields}
    assert fields - rows == set(), f"these fields have no row that is sent to {endpoint.path}"

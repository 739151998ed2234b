"""Every cell of the table in docs/models.md."""

from __future__ import annotations

import pytest

from . import model_table
from .small_models import MODELS, all_models

ROWS = model_table.rows(model_table.PAGE.read_text())


def test_the_table_has_all_models_and_columns():
    assert list(ROWS) == list(MODELS)
    assert all(list(cells) == list(model_table.COLUMNS) for cells in ROWS.values())


@pytest.mark.parametrize("column", model_table.COLUMNS)
@all_models
def test_a_cell(name, column):
    assert model_table.COLUMNS[column](name) == ROWS[name][column]

"""docs/models.md: every cell of its table; all else is what tests/model_table.py writes."""

from __future__ import annotations

import pytest

from .. import model_table
from ..small_models import MODELS, all_models

TEXT = model_table.PAGE.read_text()
ROWS = model_table.rows(TEXT)


def test_the_table_has_all_models_and_columns():
    assert list(ROWS) == list(MODELS)
    assert all(list(cells) == list(model_table.COLUMNS) for cells in ROWS.values())


def test_the_rest_of_the_page():
    assert model_table.page(lambda name, column: ROWS[name][column]) == TEXT


@pytest.mark.parametrize("column", model_table.COLUMNS)
@all_models
def test_a_cell(name, column):
    assert model_table.COLUMNS[column](name) == ROWS[name][column]

"""Pictures side by side."""

import numpy as np
import torch

from latteflow.data.grid import picture_grid


def test_pictures_stand_row_by_row_and_the_rest_is_white():
    pictures = torch.stack([torch.full((3, 2, 4), value) for value in (-1.0, 0.0, 1.0, -1.0, -7.0)])
    grid = np.asarray(picture_grid(pictures, columns=3))
    assert grid.shape == (4, 12, 3)
    cells = grid.reshape(2, 2, 3, 4, 3)[:, 0, :, 0, 0]
    assert cells.tolist() == [[0, 128, 255], [0, 0, 255]]


def test_rows_columns_and_channels_are_not_swapped():
    picture = torch.full((1, 3, 2, 3), -1.0)
    picture[0, 1, 0, 2] = 1
    grid = np.asarray(picture_grid(picture, columns=1))
    assert grid[0, 2].tolist() == [0, 255, 0]
    assert grid.sum() == 255


def test_a_graph_and_half_precision_do_no_harm():
    pictures = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert picture_grid(pictures, columns=2).size == (4, 2)

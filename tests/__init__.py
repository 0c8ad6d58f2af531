"""Tests of advalign; their import comes before the library's, whose shapes are checked from then on."""

from tests import shapes

shapes.install()

"""Steering: a concept's linear map, or a single direction, added to hidden states while a model generates.

>>> operator = Operator.make(loclin.linearize(model, "The bridge out of Marin is the Golden"), layer=12)
>>> with operator.apply(model, strength=0.8):
...     model.hf.generate(**inputs)
"""

from loclin.steering.base import Steering
from loclin.steering.form import Form, move_towards
from loclin.steering.operator import Operator, merge
from loclin.steering.vector import (
    Vector,
    activation_addition,
    contrast,
    mean_difference,
    output_basis,
    pullback,
    random_direction,
)

__all__ = [
    "Form",
    "Operator",
    "Steering",
    "Vector",
    "activation_addition",
    "contrast",
    "mean_difference",
    "merge",
    "output_basis",
    "pullback",
    "random_direction",
    "move_towards",
]

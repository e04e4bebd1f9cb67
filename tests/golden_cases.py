"""The closed-form inputs of golden/losses.json, regenerated, and the comparison with its numbers.

The numbers were computed by other people's code; golden/losses.json is a copy and is never written here.
"""

import json
import math
from pathlib import Path

import torch

DOCUMENT = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
CASES = DOCUMENT["golden"]
FINGERPRINTS = DOCUMENT["meta"]["fingerprints"]

SHAPES = {  # meta.inputs: shape, b, scale
    "LS": ((6, 10), 0.1, 2.0),
    "LT": ((6, 10), 1.3, 3.0),
    "FS": ((6, 8, 6, 6), 0.2, 1.5),
    "FT": ((6, 8, 6, 6), 2.1, 1.0),
    "FS2": ((6, 8, 6, 6), 0.9, 1.0),
    "FT2": ((6, 8, 6, 6), 2.9, 1.2),
    "ES": ((6, 12), 0.4, 1.0),
    "ET": ((6, 12), 1.7, 1.5),
    "SS": ((2, 5, 11), 0.6, 2.0),
    "ST": ((2, 5, 11), 1.9, 2.5),
    "HS": ((2, 5, 8), 0.3, 1.0),
    "HT": ((2, 5, 8), 1.1, 1.3),
    "AS": ((2, 3, 5, 5), 0.3, 2.0),
    "AT": ((2, 3, 5, 5), 1.1, 2.0),
}


def generate(shape, b, scale):
    """x_i = scale · sin(0.7 i + 0.013 i² + b), i = 1..n, float64, row-major."""
    count = math.prod(shape)
    values = [scale * math.sin(0.7 * i + 0.013 * i * i + b) for i in range(1, count + 1)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


INPUTS = {name: generate(*how) for name, how in SHAPES.items()}
CLASSES = torch.tensor(DOCUMENT["meta"]["inputs"]["Y"])
TOKEN_LABELS = torch.tensor(DOCUMENT["meta"]["inputs"]["SL"])


def measure(function, student):
    """Value, L1 norm of the gradient in the student, and its dot product with the fixed vector."""
    student = student.clone().requires_grad_()
    value = function(student)
    (gradient,) = torch.autograd.grad(value, student)
    weight = generate(gradient.shape, 5.0, 1.0)
    return {
        "value": value.item(),
        "grad_l1": gradient.abs().sum().item(),
        "grad_dot": (gradient * weight).sum().item(),
    }


def tolerance(oracle):
    """Relative: 1e-9 in float64; Keras clips probabilities at 1e-7 and computes in float32."""
    return 1e-7 if oracle.startswith("keras") else 1e-9

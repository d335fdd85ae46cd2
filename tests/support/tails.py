"""Ten matrices with tails of many kinds, the same everywhere, and what WeightWatcher says of them.

``python -m tests.support.tails`` prints WeightWatcher's numbers, where it is installed.
"""

import numpy as np

# name -> alpha and D of weightwatcher 0.7.7, as printed by the command above.
WEIGHTWATCHER = {
    "gaussian, square": (10.89176, 0.12419),
    "gaussian, wide": (6.06876, 0.13084),
    "student-t, 3 degrees of freedom": (4.22630, 0.06010),
    "student-t, 2 degrees of freedom": (2.45208, 0.06677),
    "correlated rows": (1.74581, 0.03183),
    "low rank and noise": (1.93963, 0.15282),
    "of low rank": (2.05233, 0.17049),
    "trained, first layer": (2.70765, 0.12343),
    "trained, second layer": (10.76161, 0.16012),
    "small sample": (2.15584, 0.15975),
}


def ten_matrices():
    """Return name -> matrix, float32; RandomState has the same numbers in every NumPy."""
    random = np.random.RandomState(0)
    normal, student = random.standard_normal, random.standard_t
    first, second = _trained(random)
    spread = np.arange(1, 241) ** -0.7
    found = {
        "gaussian, square": normal((200, 200)) / 14,
        "gaussian, wide": normal((150, 600)) / 20,
        "student-t, 3 degrees of freedom": student(3, (300, 100)) / 17,
        "student-t, 2 degrees of freedom": student(2, (256, 256)) / 16,
        "correlated rows": spread[:, None] * normal((240, 320)),
        "low rank and noise": normal((128, 4)) @ normal((4, 384)) / 20 + normal((128, 384)) / 20,
        "of low rank": normal((120, 60)) @ normal((60, 120)) / 60,
        "trained, first layer": first,
        "trained, second layer": second,
        "small sample": student(3, (15, 40)) / 6,
    }
    return {name: matrix.astype(np.float32) for name, matrix in found.items()}


def _trained(random):
    """Return the weights [96, 48] and [32, 96] of a network after 400 steps of gradient descent."""
    x = random.standard_normal((256, 48)) * np.arange(1, 49) ** -0.5
    y = np.tanh(x @ random.standard_normal((48, 32)))
    first = random.standard_normal((96, 48)) / 7
    second = random.standard_normal((32, 96)) / 10
    for _ in range(400):
        hidden = np.tanh(x @ first.T)
        error = (hidden @ second.T - y) / len(x)
        back = error @ second * (1 - hidden**2)
        first, second = first - 0.5 * back.T @ x, second - 0.5 * error.T @ hidden
    return first, second


def of_weightwatcher(matrix):
    """Return alpha and D as the package weightwatcher computes them for a layer."""
    import torch
    import weightwatcher

    layer = torch.nn.Linear(*matrix.shape[::-1], bias=False)
    layer.weight.data = torch.tensor(matrix)
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
    (row,) = watcher.analyze().to_dict("records")
    return row["alpha"], row["D"]


if __name__ == "__main__":
    for name, matrix in ten_matrices().items():
        alpha, distance = of_weightwatcher(matrix)
        print(f'    "{name}": ({alpha:.5f}, {distance:.5f}),')

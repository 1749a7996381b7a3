"""The generators are frozen: results that name a phantom set are comparable only while its films stay what they are."""
import pytest

from adam_nb.fundus import fundus_phantom
from adam_nb.phantom import chest_phantom

# kind, seed, index, mean and standard deviation of the image at 128², pixels in all masks, first landmarks (px), positive labels
FILMS = [
    ('chest', 0, 0, 0.4394, 0.3074, 8192, [35.7, 23.8, 56.1, 42.5, 28.7, 55.6], []),
    ('chest', 0, 1, 0.6363, 0.2661, 12200, [40.8, 13.5, 61.8, 37.7, 31.6, 50.7], ['cardiomegaly', 'consolidation', 'nodule']),
    ('chest', 0, 7, 0.5343, 0.2112, 11162, [37.0, 18.5, 59.5, 41.3, 25.3, 57.0], []),
    ('chest', 1, 3, 0.4482, 0.2939, 10389, [30.8, 31.6, 53.3, 46.6, 23.0, 63.2], ['pneumothorax']),
    ('fundus', 0, 0, 0.2571, 0.2355, 13525, [92.4, 64.3, 57.9, 65.8], []),
    ('fundus', 0, 1, 0.2671, 0.2648, 13279, [99.0, 65.1, 60.8, 64.3], ['microaneurysm']),
    ('fundus', 0, 7, 0.2991, 0.284, 13035, [101.6, 56.0, 60.6, 62.8], []),
    ('fundus', 1, 3, 0.2789, 0.2566, 12906, [31.6, 59.4, 62.6, 58.9], []),
]


@pytest.mark.parametrize("kind, seed, index, mean, std, pixels, points, labels", FILMS)
def test_the_generator_is_frozen(kind, seed, index, mean, std, pixels, points, labels):
    p = (chest_phantom if kind == "chest" else fundus_phantom)(seed, index, 128)
    assert float(p.image.mean()) == pytest.approx(mean, abs=2e-4) and float(p.image.std()) == pytest.approx(std, abs=2e-4)
    assert sum(int(m.sum()) for m in p.masks.values()) == pytest.approx(pixels, abs=5)         # rounding may differ by machine
    assert [float(v) for xy in p.landmarks.values() for v in xy][:6] == pytest.approx(points, abs=0.11)
    assert [k for k, v in p.labels.items() if v] == labels

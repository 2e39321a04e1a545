import pytest

from experiments.bench_siglip_cpu.run import SIZES, gigaflops, jax_worker, products


def test_products_are_the_layers_of_both_towers():
    assert products(SIZES["b16"], 8) == [(2048, 2048, 2048), (1568, 768, 768), (1568, 768, 3072), (1568, 3072, 768), (512, 768, 768), (512, 768, 3072),
                                         (512, 3072, 768)]


def test_rates_from_medians():
    assert gigaflops({"forward": 1.0, "product_10x100x1000": 0.001}) == {"10x100x1000": pytest.approx(2.0)}


def test_our_worker_counts_every_product_and_its_step_learns():
    size, batch = SIZES["smoke"], 3
    functions, facts = jax_worker(size, batch)
    width, tokens, patches, inputs = size["width"], size["length"], 16, 3 * size["patch"] ** 2
    image = size["depth"] * patches * (24 * width ** 2 + 4 * patches * width) + 2 * patches * inputs * width
    pooling = 2 * (2 * patches * width ** 2 + 9 * width ** 2) + 4 * patches * width + 2 * width ** 2 / batch   # the probe is projected once for all
    text = size["depth"] * tokens * (24 * width ** 2 + 4 * tokens * width) + 2 * width ** 2
    similarity = 2 * batch ** 2 * width
    assert facts["forward_flops"] == batch * (image + pooling + text) + similarity
    assert 2.5 < facts["train_flops"] / facts["forward_flops"] < 3
    assert {"forward", "train"} < set(functions)
    cells = dict(zip(functions["train"].__code__.co_freevars, functions["train"].__closure__))
    losses = []
    for _ in range(2):
        functions["train"]()
        losses.append(cells["holder"].cell_contents["loss"])
    assert losses[1] < losses[0]

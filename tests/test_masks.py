"""What tokens of packed and of padded rows see, as a dense mask and as blocks for flex attention."""

import threading

import pytest
import torch
from conftest import small_config
from torch.nn.attention.flex_attention import flex_attention

from hrm_lm.data.collate import pack, pack_apart, pad, to_device
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.models import encoder_decoder, layers, masks
from hrm_lm.models.build import build_model
from hrm_lm.models.masks import BLOCK, visible_blocks, visible_keys
from hrm_lm.training.step import build_state

VOCAB = 20
LENGTHS = ((90, 30), (1, 0), (2, 140), (300, 9), (150, 280), (40, 40))


def some(*lengths: tuple[int, int]) -> Ragged:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(4, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return Ragged.of([Sample(draw(s), draw(t)) for s, t in lengths])


def ranges(side: str, samples: Ragged, rows: tuple[int, int]):
    """What the tokens of a packed row see: from, to, and of how many keys. rows: of prompts and of responses."""
    if side == "prefix_lm":
        batch = pack(samples, SimpleTokenizer, width=sum(rows))
        return batch.sees_from, batch.sees_to, sum(rows)
    batch = pack_apart(samples, SimpleTokenizer, rows=rows)
    if side == "encoder":
        return batch.encoder_sees_from, batch.encoder_sees_to, rows[0]
    if side == "cross":
        return batch.decoder_sees_from, batch.decoder_sees_to, rows[0]
    place = torch.arange(rows[1])[None]
    return place - batch.decoder_positions, place, rows[1]


SIDES = pytest.mark.parametrize("side", ["prefix_lm", "encoder", "decoder", "cross"])
WIDTHS = pytest.mark.parametrize("rows", [(600, 520), (640, 512)], ids=["odd", "whole_blocks"])


def test_a_packed_token_sees_its_own_sample_alone():
    rows = (10, 9)
    samples = some((3, 2), (1, 0), (4, 3))  # with EOS 3, 1 and 4 labels
    seen = {side: visible_keys(*ranges(side, samples, rows))[0, 0].int().tolist() for side in ("encoder", "cross")}
    first, second, third = [1] * 3 + [0] * 7, [0, 0, 0, 1] + [0] * 6, [0] * 4 + [1] * 4 + [0] * 2
    assert seen["encoder"] == [first] * 3 + [second] + [third] * 4 + [[0] * 8 + [1, 0], [0] * 9 + [1]]
    assert seen["cross"] == [first] * 3 + [second] + [third] * 5
    decoder = visible_keys(*ranges("decoder", samples, rows))[0, 0]
    of_sample = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])  # the last is padding
    assert torch.equal(decoder, (of_sample[:, None] == of_sample).tril())


@SIDES
@WIDTHS
def test_blocks_of_the_mask_hold_what_the_mask_holds(side, rows):
    sees_from, sees_to, keys = ranges(side, some(*LENGTHS), rows)
    mask, blocks = visible_keys(sees_from, sees_to, keys)[0, 0], visible_blocks(sees_from, sees_to, keys)
    queries = mask.shape[0]
    rest = (0, -keys % BLOCK, 0, -queries % BLOCK)
    tiles = torch.nn.functional.pad(mask, rest).view(-(-queries // BLOCK), BLOCK, -(-keys // BLOCK), BLOCK)
    listed = 0
    for q in range(tiles.shape[0]):
        partial = blocks.kv_indices[0, 0, q, : blocks.kv_num_blocks[0, 0, q]].tolist()
        whole = blocks.full_kv_indices[0, 0, q, : blocks.full_kv_num_blocks[0, 0, q]].tolist()
        assert not set(partial) & set(whole)
        listed += len(partial) + len(whole)
        for k in range(tiles.shape[2]):
            assert k in partial + whole or not tiles[q, :, k].any()
            assert k not in whole or tiles[q, :, k].all()
    assert listed < 0.8 * tiles.shape[0] * tiles.shape[2], "blocks that no token sees are left out"
    places = torch.arange(queries)
    assert torch.equal(blocks.mask_mod(torch.tensor(0), None, places[:, None], torch.arange(keys)), mask)
    q, k = torch.randn(1, 1, queries, 16), torch.randn(1, 1, keys, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    torch.testing.assert_close(flex_attention(q, k, k, block_mask=blocks), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("collate", [pad, pack_apart])
def test_an_encoder_decoder_with_blocks_predicts_what_it_predicts_with_dense_masks(monkeypatch, collate):
    """On CPU, where flex attention has no backward and none of it is compiled."""
    torch.manual_seed(0)
    model = build_model(small_config().model, VOCAB).eval()
    batch = collate(some((150, 140), (20, 9), (131, 200)), SimpleTokenizer)
    with torch.no_grad():
        dense = model(batch, model.config.hrm.cycles).predictions[-1].losses
        for module in (masks, encoder_decoder):
            monkeypatch.setattr(module, "takes_blocks", lambda *_: True)
        called = []
        monkeypatch.setattr(
            layers, "compiled_flex_attention", lambda: lambda *a, **k: called.append(1) or flex_attention(*a, **k)
        )
        for block in model.decoder:
            block._compiled_call_impl = block._call_impl  # as compiled
        blocks = model(batch, model.config.hrm.cycles).predictions[-1].losses
    assert len(called) == (1 + 6 + 1) + (collate is pack_apart)  # encoder, core, cross; a padded decoder is causal
    torch.testing.assert_close(blocks, dense, atol=1e-5, rtol=1e-5)


# --- on a GPU ----------------------------------------------------------------------------------------------------


def attended(q, k, v, gradient, mask, dtype) -> dict[str, torch.Tensor]:
    """What attention gives, and its gradients, from inputs in `dtype`."""
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    out = layers.attend(*inputs, mask)
    out.backward(gradient.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (x.float() for x in (out.detach(), *(x.grad for x in inputs)))))


def distances(results: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((results[name] - x).norm() / x.norm()) for name, x in reference.items()}


@pytest.fixture
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@SIDES
@WIDTHS
def test_flex_attention_is_dense_attention_and_in_bf16_no_less_exact(side, rows, exact_products):
    sees_from, sees_to, keys = (
        x.cuda() if isinstance(x, torch.Tensor) else x for x in ranges(side, some(*LENGTHS), rows)
    )
    torch.manual_seed(0)
    queries = sees_from.shape[1]
    q, k, v, gradient = (torch.randn(1, 4, n, 64, device="cuda") for n in (queries, keys, keys, queries))
    dense, blocks = visible_keys(sees_from, sees_to, keys), visible_blocks(sees_from, sees_to, keys)
    reference = attended(q, k, v, gradient, dense, torch.float64)
    exact = distances(attended(q, k, v, gradient, blocks, torch.float32), reference)
    assert max(exact.values()) < 1e-4, f"flex in float32 is off by {exact}"
    flex, usual = (distances(attended(q, k, v, gradient, mask, torch.bfloat16), reference) for mask in (blocks, dense))
    print(f"{side} {rows}: distance from float64 in bf16, flex {flex}, dense {usual}")
    assert all(flex[name] < 2 * usual[name] for name in flex), f"flex in bf16 is off by {flex}, dense by {usual}"


@pytest.mark.gpu
@pytest.mark.parametrize("collate", [pad, pack_apart, pack])
def test_a_compiled_model_with_blocks_is_no_less_exact_than_one_with_dense_masks(monkeypatch, collate, exact_products):
    """In bf16, against float32. Lengths differ from batch to batch, so that the compiler must take sizes as free ones."""
    fields = {"model__d_model": 128, "model__max_prompt_len": 700, "model__max_response_len": 700}
    fields["model__architecture"] = "prefix_lm" if collate is pack else "encoder_decoder"
    batches = [
        to_device(collate(some(*lengths), SimpleTokenizer), torch.device("cuda"))
        for lengths in (((530, 515), (90, 30)), ((610, 530), (7, 80), (520, 600)), ((550, 640), (1, 0), (30, 520)))
    ]

    def trained(flex_from: int, dtype: torch.dtype, compiled: bool) -> list[dict[str, torch.Tensor]]:
        monkeypatch.setattr(masks, "FLEX_FROM", flex_from)
        config, results = small_config(train__compile=compiled, **fields), []
        model = build_state(config, VOCAB, torch.device("cuda")).model
        for batch in batches:
            model.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
                losses = model(batch, config.model.hrm.cycles).predictions[-1].losses
            losses.sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append({"losses": losses.detach(), "gradients": gradients})
        return results

    torch._dynamo.reset()
    never = 10**9
    exact, dense = trained(never, torch.float32, False), trained(never, torch.bfloat16, False)
    blocks = trained(512, torch.bfloat16, True)
    for i, reference in enumerate(exact):
        flex, usual = distances(blocks[i], reference), distances(dense[i], reference)
        print(f"{collate.__name__}, batch {i}: distance from float32 in bf16, flex {flex}, dense {usual}")
        assert all(flex[name] < 2 * usual[name] for name in flex), f"batch {i}: flex is off by {flex}, dense by {usual}"


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
@pytest.mark.parametrize("n_heads, dense", [(2, False), (4, True)])
def test_heads_too_small_for_flex_attention_take_dense_masks(monkeypatch, architecture, n_heads, dense):
    config = small_config(model__architecture=architecture, model__d_model=32, model__n_heads=n_heads)
    asked = []
    monkeypatch.setattr(masks, "takes_blocks", lambda *arguments: asked.append(arguments[-1]))
    collate = pack if architecture == "prefix_lm" else pack_apart
    build_model(config.model, VOCAB)(collate(some((5, 3), (2, 4)), SimpleTokenizer), config.model.hrm.cycles)
    assert asked and all(answer == dense for answer in asked)


def test_in_every_thread_flex_attention_is_compiled_as_often_as_it_has_kinds():
    """Otherwise it falls back to holding all scores. PyTorch 2.13 keeps its settings for each thread."""
    limits = []

    def look() -> None:
        layers.compiled_flex_attention()
        limits.append(torch._dynamo.config.recompile_limit)

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert min(limits) >= 64

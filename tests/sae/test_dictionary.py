"""A finished dictionary: folding, files, refusals."""

import json

import pytest
import torch

from sae_dist.config import UserError
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.config import BatchTopK, TopK, check_width, resolved_k_aux
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.sae.scale import Scale, Scales, input_scale, latent_scale
from sae_dist.sae.variants.interface import AUTOENCODER, B_IN, Sizes
from tests.allocations import Allocations


def random_parameters(d_model: int = 12, n_latents: int = 40) -> Parameters:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    W_dec = draw(n_latents, d_model)
    return Parameters(
        draw(n_latents, d_model).T, W_dec / W_dec.norm(dim=-1, keepdim=True), draw(n_latents), draw(d_model)
    )


def dictionary(parameters: Parameters) -> Dictionary:
    return Dictionary(parameters=parameters, k=5, info={"variant": "topk", "hook": "resid_post.1"})


def test_the_input_scale_makes_the_mean_square_norm_d_model():
    x = 7 * torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
    scale = input_scale(float(x.square().sum(-1).mean()), 32)
    assert float((x * scale).square().sum(-1).mean()) == pytest.approx(32, rel=1e-5)


def scales_of(x: float, target: float) -> Scales:
    return Scales(Scale((x,), (12,)), Scale((target,), (12,)), target)


def test_folded_on_raw_input_is_unfolded_on_scaled_input():
    parameters, scale = random_parameters(), 0.04
    x = 25 * torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    scales = scales_of(scale, scale)
    folded = Parameters(*(spec.folded(tensor, scales) for spec, tensor in zip(AUTOENCODER, parameters, strict=True)))
    assert torch.equal(folded.W_enc, parameters.W_enc)  # bit for bit
    trained, folded = dictionary(parameters), dictionary(folded)
    on_scaled, on_raw = trained.encode(x * scale), folded.encode(x)
    assert torch.equal(on_scaled.indices, on_raw.indices)
    assert torch.allclose(on_scaled.values / scale, on_raw.values, rtol=1e-4, atol=1e-4)
    assert torch.allclose(trained.decode(on_scaled) / scale, folded.decode(on_raw), rtol=1e-4, atol=1e-3)


def test_of_several_hook_points_each_is_folded_by_its_own_scale():
    side = Scale((0.04, 2.0), (5, 7))
    parameters, scales = random_parameters(), Scales(side, side, latent_scale(side))
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(2)) * torch.tensor([25.0] * 5 + [0.5] * 7)
    rows = parameters._replace(W_enc=parameters.W_enc.t())
    folded = Parameters(*(spec.folded(part, scales) for spec, part in zip(AUTOENCODER, rows, strict=True)))
    folded = folded._replace(W_enc=folded.W_enc.t())
    trained, folded = dictionary(parameters), dictionary(folded)
    on_scaled, on_raw = trained.encode(side.of(x)), folded.encode(x)
    assert torch.equal(on_scaled.indices, on_raw.indices)
    torch.testing.assert_close(on_scaled.values / scales.z, on_raw.values, rtol=1e-4, atol=1e-3)
    expected = trained.decode(on_scaled) / side.by_dim()
    torch.testing.assert_close(folded.decode(on_raw), expected, rtol=1e-4, atol=1e-3)


def transcoder(parameters: Parameters, b_in: torch.Tensor) -> Dictionary:
    info = {"variant": "topk", "hook": "resid_pre.1", "target_hook": "mlp_out.1"}
    return Dictionary(parameters=parameters, k=5, info=info, b_in=b_in)


def test_a_transcoder_is_folded_by_the_scales_of_both_sides_and_saved_with_both_widths(tmp_path):
    g, scales = torch.Generator().manual_seed(0), scales_of(0.04, 3.0)
    own, x = random_parameters(), 25 * torch.randn(50, 9, generator=g)
    parameters = own._replace(W_enc=torch.randn(40, 9, generator=g).T)
    b_in = torch.randn(9, generator=g)
    trained = transcoder(parameters, b_in)
    folded = Parameters(*(spec.folded(tensor, scales) for spec, tensor in zip(AUTOENCODER, parameters, strict=True)))
    assert torch.equal(folded.W_dec, parameters.W_dec)  # its rows keep norm 1
    dictionary_file.save(transcoder(folded, B_IN.folded(b_in, scales)), tmp_path)
    loaded = dictionary_file.load(tmp_path)
    assert loaded.sizes == (40, 9, 12) and loaded.b_in is not None
    on_scaled, on_raw = trained.encode(x * 0.04), loaded.encode(x)
    assert torch.equal(on_scaled.indices, on_raw.indices)
    expected = trained.decode(on_scaled) / 3.0
    torch.testing.assert_close(loaded.decode(on_raw), expected, rtol=1e-4, atol=1e-4)
    z = ((x * 0.04 - b_in) @ parameters.W_enc + parameters.b_enc).relu()
    kept = torch.zeros_like(z).scatter(1, z.topk(5).indices, z.topk(5).values)
    torch.testing.assert_close(expected, (kept @ parameters.W_dec + parameters.b_dec) / 3, rtol=1e-4, atol=1e-4)


def test_encode_and_decode_are_the_documented_formula():
    found = dictionary(random_parameters())
    W_enc, W_dec, b_enc, b_dec = found.parameters
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(3))
    z = ((x - b_dec) @ W_enc + b_enc).relu()
    kept = torch.zeros_like(z).scatter(1, z.topk(5).indices, z.topk(5).values)
    assert torch.allclose(found.decode(found.encode(x)), kept @ W_dec + b_dec, atol=1e-5)


def test_a_saved_dictionary_loads_bit_for_bit(tmp_path):
    saved = dictionary(random_parameters())
    dictionary_file.save(saved, tmp_path)
    loaded = dictionary_file.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters, loaded.parameters, strict=True))
    assert (loaded.k, loaded.info["hook"]) == (5, "resid_post.1")


@pytest.mark.parametrize(
    "damage",
    ["no config", "no weights", "cut weights", "a bit of the weights", "k", "no JSON", "no object", "other format"],
)
def test_a_folder_that_is_not_a_whole_dictionary_is_refused(tmp_path, damage):
    dictionary_file.save(dictionary(random_parameters()), tmp_path)
    weights, config = tmp_path / "dictionary.safetensors", tmp_path / "config.json"
    match damage:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "a bit of the weights":
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 64
            weights.write_bytes(data)
        case "k":
            config.write_text(config.read_text().replace('"k": 5', '"k": 6'))
        case "no JSON":
            config.write_bytes(b"\xff{")
        case "no object":
            config.write_text("[1]")
        case "other format":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=str(tmp_path)):
        dictionary_file.load(tmp_path)


def test_a_row_that_is_active_everywhere_needs_memory_for_itself_alone():
    """A massive activation: 500 rows with few latents each and one with half of 20,000."""
    g = torch.Generator().manual_seed(5)
    W_enc, x = torch.randn(12, 20_000, generator=g), torch.randn(501, 12, generator=g)
    parameters = Parameters(W_enc, W_enc.T.contiguous(), torch.zeros(20_000), torch.zeros(12))
    theta = torch.full((20_000,), 14.0)
    x[7] *= 1000
    loud = Dictionary(parameters=parameters, k=5, info={"variant": "batchtopk"}, threshold=theta)
    with Allocations() as seen:
        active = loud.encode(x)
        x_hat = loud.decode(active)
    assert active.offsets.diff()[7] > 9000 and max(seen.bytes) <= 8 * 501 * 4096  # a tile of latents
    z = (x @ W_enc).double()
    torch.testing.assert_close(x_hat.double(), torch.where(z > theta, z, 0.0) @ W_enc.T.double(), rtol=1e-4, atol=1e-2)


def test_with_thresholds_a_latent_is_active_above_its_own(tmp_path):
    theta = torch.rand(40, generator=torch.Generator().manual_seed(4))
    found = Dictionary(parameters=random_parameters(), k=5, info={"variant": "batchtopk"}, threshold=theta)
    dictionary_file.save(found, tmp_path)
    loaded = dictionary_file.load(tmp_path)
    assert loaded.threshold is not None and torch.equal(loaded.threshold, theta)
    W_enc, W_dec, b_enc, b_dec = found.parameters
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(3))
    z = (x - b_dec) @ W_enc + b_enc
    active = loaded.encode(x)
    kept = torch.where(z > theta, z, 0.0)
    assert torch.equal(active.offsets.diff(), (kept > 0).sum(1))
    assert torch.allclose(active.values, kept[active.rows, active.indices], atol=1e-5)
    assert all(bool((row[:-1] >= row[1:]).all()) for row in active.values.split(active.offsets.diff().tolist()))
    assert torch.allclose(loaded.decode(loaded.encode(x)), kept @ W_dec + b_dec, atol=1e-4)
    assert loaded.encode(x[:0]).offsets.tolist() == [0]
    silent = Dictionary(parameters=found.parameters, k=5, info=found.info, threshold=torch.full((40,), 1e9))
    assert torch.allclose(silent.decode(silent.encode(x)), b_dec.expand(9, -1))


def test_a_variant_and_a_threshold_that_do_not_go_together_are_refused(tmp_path):
    for variant, specs, said in (
        ("batchtopk", AUTOENCODER, "variant=batchtopk in .* do not agree on threshold"),
        ("topk", BatchTopK().tensors, "variant=topk in .* do not agree on threshold"),
        ("other", AUTOENCODER, "variant=other; this program knows topk, batchtopk"),
    ):
        sizes = Sizes(4, 3, 3)
        rows = {spec: torch.ones(spec.shape(sizes)) for spec in specs}
        parts = ((spec, 0, tensor.t() if spec.stored_transposed else tensor) for spec, tensor in rows.items())
        dictionary_file.write(tmp_path, parts, specs=specs, k=2, info={"variant": variant}, sizes=sizes)
        with pytest.raises(UserError, match=said):
            dictionary_file.load(tmp_path)


def test_k_aux_is_the_power_of_two_below_half_the_width():
    assert resolved_k_aux(TopK(), 576) == 256
    assert resolved_k_aux(TopK(), 512) == 256
    assert resolved_k_aux(TopK(), 4096) == 2048
    assert resolved_k_aux(TopK(n_latents=100), 4096) == 100
    assert resolved_k_aux(TopK(k_aux=0), 4096) == 0


@pytest.mark.parametrize("impossible", [TopK(n_latents=16, k=16), TopK(n_latents=4096, k=65)])
def test_a_dictionary_that_cannot_work_is_refused(impossible):
    with pytest.raises(UserError, match="sae.k="):
        check_width(impossible, 64)

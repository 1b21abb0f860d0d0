// The entry points that Python calls through ctypes: plain pointers, no torch, so nothing to rebuild for another torch.
//
// Needs AVX-512 with BF16; `build.py` asks the processor first.

#include <algorithm>

#include "aux.h"
#include "latents.h"
#include "parallel.h"
#include "rows.h"
#include "select.h"
#include "vectors.h"

using namespace sae;

extern "C" {

// vdpbf16ps on 16 (sum, pair, pair): lets the caller compare this processor's order of additions with the documented.
void sae_pair_product(const float* sum, const uint32_t* a, const uint32_t* b, float* out) {
    _mm512_storeu_ps(out, _mm512_dpbf16_ps(_mm512_loadu_ps(sum), (__m512bh)_mm512_loadu_si512(a),
                                           (__m512bh)_mm512_loadu_si512(b)));
}

// out [n, padded] = bf16(a [n, d] - minus [d]), zero beyond d.
void sae_round(const float* a, const float* minus, uint16_t* out, long n, long d, long padded, long threads) {
    parallel(blocks(n, CHUNK), threads, [&](long task) {
        for (long r = task * CHUNK; r < n && r < (task + 1) * CHUNK; r++)
            round_row(a + r * d, minus, out + r * padded, d, padded);
    });
}

// The k best of relu(z) per row -> values, indices [batch, k]. x [batch, pairs], w [n_latents, pairs]: bf16 pairs.
// Scratch: panels, least and count [rows rounded up to 64], candidates [batch, room].
void sae_select(const uint32_t* x, const uint32_t* w, const float* b_enc, long batch, long n_latents, long pairs,
                uint32_t* panels, long k, long room, float* least, int* count, float* candidate_values,
                int* candidate_indices, float* values, int* indices, long sorted, long threads) {
    const Best best{k, room, least, count, candidate_values, candidate_indices};
    const long n_panels = blocks(batch, PANEL);
    const long size = std::clamp(n_panels / (4 * threads), 1L, TASK_PANELS);
    parallel(blocks(n_panels, size), threads, [&](long task) {
        const long first = task * size, last = std::min(first + size, n_panels);
        for (long panel = first; panel < last; panel++) pack(x, panels, batch, pairs, panel);
        for (long r = first * PANEL; r < last * PANEL; r++) least[r] = r < batch ? 0 : INFINITY, count[r] = 0;
        select_panels(w, panels, pairs, b_enc, n_latents, first, last, best);
        for (long r = first * PANEL; r < last * PANEL && r < batch; r++)
            finish(best, r, sorted, values + r * k, indices + r * k);
    });
}

// error [batch, d] = target - decode(values, indices) (- b_dec), squares [batch], d_z [batch, k] = scale error . W_dec.
void sae_rows(const float* target, const float* b_dec, const float* values, const int* indices, const float* W_dec,
              long batch, long k, long d, float scale, float* error, float* squares, float* d_z, long threads) {
    parallel(blocks(batch, 16), threads, [&](long task) {
        for (long r = task * 16; r < batch && r < (task + 1) * 16; r++) {
            float* e = error + r * d;
            squares[r] = row_error(target + r * d, b_dec, values + r * k, indices + r * k, k, W_dec, e, d);
            row_d_z(e, values + r * k, indices + r * k, k, W_dec, scale, d_z + r * k, d);
        }
    });
}

// fired [n_latents] = whether a latent is among the positive values; returns how many values are positive.
long sae_fired(const float* values, const int* indices, long n, uint8_t* fired, long n_latents) {
    long active = 0;
    memset(fired, 0, n_latents);
    for (long i = 0; i < n; i++)
        if (values[i] > 0) active++, fired[indices[i]] = 1;
    return active;
}

void sae_pairs(const Chosen* chosen, int kinds, long batch, long n_latents, long* offsets, Pair* pairs, long threads) {
    pairs_by_latent(chosen, kinds, batch, n_latents, threads, offsets, pairs);
}

struct Parameters {
    float *enc, *dec, *bias;                         // [n_latents, d], [n_latents, d], [n_latents]
    float *enc_first, *dec_first, *bias_first;       // Adam's moments
    float *enc_second, *dec_second, *bias_second;
    uint16_t* rounded;                               // bf16 of enc, [n_latents, padded]
};

// Of dense gradients that AuxK gave for some latents: slots [n_latents] is their row, or -1.
struct Dense {
    const int* slots;
    const float *dec, *enc, *bias;
};

// The gradient of every latent from its pairs and, where given, from AuxK; `through_b_dec` [blocks(n_latents, 64), d]
// gets rounded enc * d_bias, summed over a chunk. Then the gradient is stored (d_enc given) or the update is made.
void sae_latents(const long* offsets, const Pair* pairs, const float* errors, const uint16_t* rows, const Dense* dense,
                 const Parameters* parameters, long n_latents, long d, long padded, const Adam* adam, float* d_enc,
                 float* d_dec, float* d_bias, float* through_b_dec, long threads) {
    const Parameters& p = *parameters;
    parallel(blocks(n_latents, CHUNK), threads, [&](long chunk) {
        std::vector<float> scratch(2 * d), biases(CHUNK);
        const long first = chunk * CHUNK, last = first + CHUNK < n_latents ? first + CHUNK : n_latents;
        auto slot = [&](long j) { return dense ? dense->slots[j] : -1; };
        for (long j = first; j < last; j++) {
            float bias = slot(j) < 0 ? 0 : dense->bias[slot(j)];
            for (long i = offsets[j]; i < offsets[j + 1]; i++) bias += pairs[i].encoder;
            biases[j - first] = bias;
        }
        auto encoder_row = [&](long j) { return p.rounded + (first + j) * padded; };
        weighted_sum(through_b_dec + chunk * d, d, last - first, encoder_row, [&](long j) { return biases[j]; });
        for (long j = first; j < last; j++) {
            const Pair* own = pairs + offsets[j];
            const long n = offsets[j + 1] - offsets[j], s = slot(j);
            float* g_dec = d_dec ? d_dec + j * d : scratch.data();
            float* g_enc = d_enc ? d_enc + j * d : scratch.data() + d;
            weighted_sum(g_dec, d, n, [&](long i) { return errors + own[i].error_row * d; },
                         [&](long i) { return own[i].decoder; });
            weighted_sum(g_enc, d, n, [&](long i) { return rows + own[i].row * padded; },
                         [&](long i) { return own[i].encoder; });
            if (s >= 0) {
                add_row(g_dec, dense->dec + s * d, d);
                add_row(g_enc, dense->enc + s * d, d);
            }
            if (d_dec) {
                d_bias[j] = biases[j - first];
                continue;
            }
            decoder_row(p.dec + j * d, g_dec, p.dec_first + j * d, p.dec_second + j * d, d, *adam, n > 0 || s >= 0);
            adam->row(p.enc + j * d, g_enc, p.enc_first + j * d, p.enc_second + j * d, d);
            adam->row(p.bias + j, &biases[j - first], p.bias_first + j, p.bias_second + j, 1);
            round_row(p.enc + j * d, nullptr, p.rounded + j * padded, d, padded);
        }
    });
}

void sae_aux_dense(const Aux* aux, long threads) { aux_dense(*aux, threads); }

// The update from a dense gradient.
void sae_update(const float* d_enc, const float* d_dec, const float* d_bias, const Parameters* parameters,
                long n_latents, long d, long padded, const Adam* adam, long threads) {
    const Parameters& p = *parameters;
    parallel(blocks(n_latents, CHUNK), threads, [&](long chunk) {
        for (long j = chunk * CHUNK; j < n_latents && j < (chunk + 1) * CHUNK; j++) {
            decoder_row(p.dec + j * d, d_dec + j * d, p.dec_first + j * d, p.dec_second + j * d, d, *adam, true);
            adam->row(p.enc + j * d, d_enc + j * d, p.enc_first + j * d, p.enc_second + j * d, d);
            adam->row(p.bias + j, d_bias + j, p.bias_first + j, p.bias_second + j, 1);
            round_row(p.enc + j * d, nullptr, p.rounded + j * padded, d, padded);
        }
    });
}

void sae_adam(float* p, const float* g, float* first, float* second, long n, const Adam* adam) {
    FlushSubnormals flush;
    adam->row(p, g, first, second, n);
}

// out [d] = sum over rows of a [n, d], fixed order: partial sums of 64 rows, then their sum.
void sae_sum_rows(const float* a, long n, long d, float* out, long threads) {
    const long parts = blocks(n, CHUNK);
    std::vector<float> partial(parts * d);
    auto one = [](long) { return 1.0f; };
    parallel(parts, threads, [&](long part) {
        const long first = part * CHUNK, size = n - first < CHUNK ? n - first : CHUNK;
        weighted_sum(partial.data() + part * d, d, size, [&](long i) { return a + (first + i) * d; }, one);
    });
    weighted_sum(out, d, parts, [&](long i) { return partial.data() + i * d; }, one);
}

}  // extern "C"

// Encoder product, bias, ReLU and exact top k in one pass; no [batch, n_latents] array.
//
// z[r, j] = b_enc[j] + sum over pairs p of the rounded operands' products, in the order that vdpbf16ps adds them: the
// order of `reference.ordered_pre_activations`. Register tile: 6 latents (broadcast) by 64 rows (4 vectors), the whole
// d_model without leaving the registers. The tile is then compared with each row's k-th best so far: almost always
// nothing passes, and the tile is forgotten.
#pragma once

#include <cstring>

#include "parallel.h"
#include "rows.h"
#include "vectors.h"

namespace sae {

constexpr long PANEL = 64;         // rows of a register tile
constexpr long TILE = 6;           // latents of a register tile
constexpr long TASK_PANELS = 8;    // at most: 512 rows of x stay in L2 while the encoder streams by
constexpr long GROUP_BYTES = 96 << 10;  // of encoder, shared by a task's panels (192 and 4 panels: 6 % slower)

inline int bits(float v) {
    int b;
    memcpy(&b, &v, 4);
    return b;
}
inline float from_bits(int b) {
    float v;
    memcpy(&v, &b, 4);
    return v;
}

// The best k of a stream of (positive value, ascending index): candidates above `least`, cut down whenever full.
struct Best {
    long k, room;                // room for candidates of one row, a multiple of LANES
    float* least; int* count;    // [rows]; a value must exceed least[row] to matter
    float* values; int* indices; // [rows, room], ascending indices

    // Keeps between k and `most` candidates, all of the k best among them. Equal values: those of lower index stay.
    void cut(long row, long most) const {
        float* v = values + row * room;
        int* ix = indices + row * room;
        const int n = count[row];
        if (n <= most) return;
        auto above = [&](int limit) {  // candidates >= limit, as bits: those of positive floats order like integers
            long c = 0;
            for (long i = 0; i < n; i += LANES)
                c += __builtin_popcount(_mm512_mask_cmp_epi32_mask(
                    lanes(n - i), _mm512_loadu_si512(v + i), _mm512_set1_epi32(limit), _MM_CMPINT_NLT));
            return c;
        };
        int low = bits(least[row]), high = 0x7f800001;  // above(low) >= k > above(high)
        long kept = n;
        while (high - low > 1) {
            const int middle = low + (high - low) / 2;
            const long c = above(middle);
            if (c < k) { high = middle; continue; }
            low = middle, kept = c;
            if (c <= most) break;
        }
        long ties = kept <= most ? n : k - above(low + 1);  // of the values equal to low, the first ones stay
        long out = 0;
        for (long i = 0; i < n; i += LANES) {
            const __mmask16 in = lanes(n - i);
            const __m512i keys = _mm512_maskz_loadu_epi32(in, v + i), id = _mm512_maskz_loadu_epi32(in, ix + i);
            __mmask16 keep = _mm512_mask_cmp_epi32_mask(in, keys, _mm512_set1_epi32(low), _MM_CMPINT_NLT);
            __mmask16 equal = _mm512_mask_cmp_epi32_mask(keep, keys, _mm512_set1_epi32(low), _MM_CMPINT_EQ);
            while (__builtin_popcount(equal) > ties) {
                const __mmask16 top = (__mmask16)(1u << (31 - __builtin_clz(equal)));
                keep &= ~top, equal &= ~top;
            }
            ties -= __builtin_popcount(equal);
            _mm512_mask_compressstoreu_epi32(v + out, keep, keys);
            _mm512_mask_compressstoreu_epi32(ix + out, keep, id);
            out += __builtin_popcount(keep);
        }
        count[row] = (int)out;
        least[row] = from_bits(low);
    }

    void add(long row, float value, int index) const {
        if (count[row] == room) {
            cut(row, k + (room - k) / 4);
            if (!(value > least[row])) return;
        }
        const long at = row * room + count[row]++;
        values[at] = value, indices[at] = index;
    }
};

// x_rounded [batch, pairs] as panels [batch / 64][pairs][64]; rows beyond the batch are zero.
inline void pack(const uint32_t* x, uint32_t* panels, long batch, long pairs, long panel) {
    uint32_t* out = panels + panel * pairs * PANEL;
    const long rows = batch - panel * PANEL;
    for (long p = 0; p < pairs; p++)
        for (long r = 0; r < PANEL; r++) out[p * PANEL + r] = r < rows ? x[(panel * PANEL + r) * pairs + p] : 0;
}

template <int LATENTS>
inline void tile(const uint32_t* w, const uint32_t* x, long pairs, const float* b_enc, __m512 z[LATENTS][4]) {
#pragma GCC unroll 6
    for (int m = 0; m < LATENTS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) z[m][v] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        __m512bh rows[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) rows[v] = (__m512bh)_mm512_loadu_si512(x + p * PANEL + v * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < LATENTS; m++) {
            const __m512bh latent = (__m512bh)_mm512_set1_epi32((int)w[m * pairs + p]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) z[m][v] = _mm512_dpbf16_ps(z[m][v], latent, rows[v]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < LATENTS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) z[m][v] = _mm512_add_ps(z[m][v], _mm512_set1_ps(b_enc[m]));
}

// What passed its row's `least` in the tiles since the last `drain`: appending does not branch on single candidates, as
// a mispredicted branch costs more than a candidate.
struct Log {
    static constexpr long SIZE = 4096, TILE_MOST = TILE * PANEL;
    long n = 0;
    alignas(64) float values[SIZE + LANES];
    alignas(64) int keys[SIZE + LANES];  // latent of the group * 64 + row of the panel

    void append(__m512 z, __mmask16 pass, int key) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(pass, z));
        const __m512i own = _mm512_add_epi32(lane, _mm512_set1_epi32(key));
        _mm512_storeu_si512(keys + n, _mm512_maskz_compress_epi32(pass, own));
        n += __builtin_popcount(pass);
    }

    void drain(const Best& best, long row, long latent) {
        for (long i = 0; i < n; i++) {
            const long r = row + keys[i] % PANEL;
            if (values[i] > best.least[r]) best.add(r, values[i], (int)(latent + keys[i] / PANEL));
        }
        n = 0;
    }
};

template <int LATENTS>
__attribute__((noinline)) void product(const uint32_t* w, const uint32_t* x, long pairs, const float* b_enc,
                                       const float* least, int key, Log& log) {
    __m512 z[LATENTS][4];
    tile<LATENTS>(w, x, pairs, b_enc, z);
#pragma GCC unroll 6
    for (int m = 0; m < LATENTS; m++) {
        __mmask16 pass[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            pass[v] = _mm512_cmp_ps_mask(z[m][v], _mm512_loadu_ps(least + v * LANES), _CMP_GT_OQ);
        if (__builtin_expect(pass[0] | pass[1] | pass[2] | pass[3], 0))
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) log.append(z[m][v], pass[v], key + m * PANEL + v * LANES);
    }
}

template <int LATENTS, class... Rest>
inline void tail(long latents, Rest&&... rest) {
    if constexpr (LATENTS > 0) {
        if (latents == LATENTS) product<LATENTS>(rest...);
        else tail<LATENTS - 1>(latents, rest...);
    }
}

// All latents against the rows of panels [first, last).
inline void select_panels(const uint32_t* w, const uint32_t* panels, long pairs, const float* b_enc, long n_latents,
                          long first, long last, const Best& best) {
    Log log;
    long group = GROUP_BYTES / (pairs * 4) / TILE * TILE;
    if (group < TILE) group = TILE;
    for (long start = 0; start < n_latents; start += group) {
        const long end = start + group < n_latents ? start + group : n_latents;
        for (long panel = first; panel < last; panel++) {
            const uint32_t* x = panels + panel * pairs * PANEL;
            const float* least = best.least + panel * PANEL;
            long j = start;
            for (; j + TILE <= end; j += TILE) {
                product<TILE>(w + j * pairs, x, pairs, b_enc + j, least, (int)((j - start) * PANEL), log);
                if (log.n > Log::SIZE - Log::TILE_MOST) log.drain(best, panel * PANEL, start);
            }
            tail<TILE - 1>(end - j, w + j * pairs, x, pairs, b_enc + j, least, (int)((j - start) * PANEL), log);
            log.drain(best, panel * PANEL, start);
        }
    }
}

// The final k of one row, empty places as (0, 0); sorted: descending, ties by the lower index.
inline void finish(const Best& best, long row, bool sorted, float* values, int* indices) {
    best.cut(row, best.k);
    const long n = best.count[row];
    const float* v = best.values + row * best.room;
    const int* ix = best.indices + row * best.room;
    for (long i = 0; i < best.k; i++) values[i] = 0, indices[i] = 0;
    for (long i = 0; i < n; i++) {
        long place = i;
        if (sorted) {
            place = 0;
            const __m512 own = _mm512_set1_ps(v[i]);
            for (long j = 0; j < n; j += LANES) {
                const __m512 other = _mm512_loadu_ps(v + j);
                const __mmask16 in = lanes(n - j), before = j > i ? 0 : lanes(i - j);
                place += __builtin_popcount(_mm512_mask_cmp_ps_mask(in, other, own, _CMP_GT_OQ));
                place += __builtin_popcount(_mm512_mask_cmp_ps_mask(in & before, other, own, _CMP_EQ_OQ));
            }
        }
        values[place] = v[i], indices[place] = ix[i];
    }
}

}  // namespace sae

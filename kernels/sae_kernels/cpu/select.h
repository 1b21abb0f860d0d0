// Encoder product, bias, ReLU and exact top k in one pass; no [batch, n_latents] array.
//
// z[r, j] = b_enc[j] + sum over pairs p of the rounded operands' products, in the order that vdpbf16ps adds them: the
// order of `reference.ordered_pre_activations`. Register tile: 6 latents (broadcast) by a panel of rows (4 vectors, with
// AVX2 2), the whole d_model without leaving the registers. The tile is then compared with each row's k-th best so far:
// almost always nothing passes, and the tile is forgotten.
#pragma once

#include <cmath>
#include <cstring>

#include "parallel.h"
#include "rows.h"
#include "vectors.h"

namespace sae {

constexpr long PANEL = VECTORS * LANES;  // rows of a register tile
constexpr long TILE = 6;                 // latents of a register tile
constexpr long TASK_PANELS = 512 / PANEL;  // at most: 512 rows of x stay in L2 while the encoder streams by
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
    long k, capacity;            // capacity: candidates of one row, a multiple of LANES
    float* least; int* count;    // [rows]; a value must exceed least[row] to matter
    float* values; int* indices; // [rows, capacity], ascending indices
    const float* slack = nullptr;  // [rows], of a screen: whatever is within slack of the k-th best stays, too

    // Keeps between k and `most` candidates, all of the k best among them. Equal values: those of lower index stay.
    // With slack: keeps all within it of some value that k candidates reach, however many they are.
    void cut(long row, long most) const {
        float* v = values + row * capacity;
        int* ix = indices + row * capacity;
        const int n = count[row];
        if (n <= most) return;
        auto above = [&](int limit) {  // candidates >= limit, as bits: those of positive floats order like integers
            long c = 0;
            for (long i = 0; i < n; i += LANES)
                c += __builtin_popcount(bits_of(lanes(n - i)) & at_least(load((const int*)v + i), splat(limit)));
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
        if (slack) low = bits(std::fmax(from_bits(low) - slack[row], least[row])), ties = n;
        long out = 0;
        for (long i = 0; i < n; i += LANES) {
            const I keys = load((const int*)v + i), id = load(ix + i);
            Bits keep = bits_of(lanes(n - i)) & at_least(keys, splat(low));
            Bits same = keep & equal(keys, splat(low));
            while (__builtin_popcount(same) > ties) {
                const Bits top = 1u << (31 - __builtin_clz(same));
                keep &= ~top, same &= ~top;
            }
            ties -= __builtin_popcount(same);
            store((int*)v + out, compress(keep, keys));  // whole vectors: what follows was read already
            store(ix + out, compress(keep, id));
            out += __builtin_popcount(keep);
        }
        count[row] = (int)out;
        least[row] = from_bits(low);
    }

    // Sets least to infinity, so that the row takes no more candidates, where slack leaves too many.
    void add(long row, float value, int index) const {
        if (count[row] == capacity) {
            cut(row, k + (capacity - k) / 4);
            if (count[row] > k + (capacity - k) / 4 * 3) least[row] = INFINITY;
            if (!(value > least[row])) return;
        }
        const long at = row * capacity + count[row]++;
        values[at] = value, indices[at] = index;
    }
};

// Rows of pairs, row(r) [pairs] or null for zeros, as one panel [pairs][PANEL].
template <class Row>
inline void pack(const Row& row, uint32_t* panel, long pairs) {
    static const uint32_t none[LANES] = {};
    for (long first = 0; first < PANEL; first += LANES) {
        const uint32_t *rows[LANES], *here[LANES];
        for (long r = 0; r < LANES; r++) rows[r] = row(first + r);
        long p = 0;
        for (; p + LANES <= pairs; p += LANES) {
            for (long r = 0; r < LANES; r++) here[r] = rows[r] ? rows[r] + p : none;
            transpose(here, panel + p * PANEL + first, PANEL);
        }
        for (; p < pairs; p++)
            for (long r = 0; r < LANES; r++) panel[p * PANEL + first + r] = rows[r] ? rows[r][p] : 0;
    }
}

template <int LATENTS>
inline __attribute__((always_inline)) void tile(const uint32_t* w, const uint32_t* x, long pairs, const float* b_enc,
                                                V (&z)[LATENTS][VECTORS]) {
#pragma GCC unroll 6
    for (int m = 0; m < LATENTS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) z[m][v] = zero();
    for (long p = 0; p < pairs; p++) add_pairs<LATENTS>(z, w + p, pairs, x + p * PANEL);
#pragma GCC unroll 6
    for (int m = 0; m < LATENTS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) z[m][v] = add(z[m][v], splat(b_enc[m]));
}

// What passed its row's `least` in the tiles since the last `drain`: appending does not branch on single candidates, as
// a mispredicted branch costs more than a candidate.
struct Log {
    static constexpr long SIZE = 4096, TILE_MOST = TILE * PANEL;
    long n = 0;
    alignas(64) float values[SIZE + LANES];
    alignas(64) int keys[SIZE + LANES];  // latent of the group * PANEL + row of the panel

    void append(V z, Bits pass, int key) {
        store(values + n, compress(pass, z));
        store(keys + n, compress(pass, add(iota(), splat(key))));
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

// z of latents j ... and the rows of a panel.
struct Exact {
    const uint32_t *w, *panels;  // [n_latents, pairs], [panels][pairs][PANEL]
    long pairs;
    const float* b_enc;

    void begin(long, long) {}  // a group of latents

    template <int LATENTS>
    __attribute__((always_inline)) void operator()(long j, long panel, V (&z)[LATENTS][VECTORS]) const {
        tile<LATENTS>(w + j * pairs, panels + panel * pairs * PANEL, pairs, b_enc + j, z);
    }
};

template <int LATENTS, class Product>
__attribute__((noinline)) void product(const Product& z_of, long j, long panel, const float* least, int key,
                                       Log& log) {
    V z[LATENTS][VECTORS];
    z_of.template operator()<LATENTS>(j, panel, z);
#pragma GCC unroll 6
    for (int m = 0; m < LATENTS; m++) {
        Bits pass[VECTORS], any = 0;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) any |= pass[v] = greater(z[m][v], load(least + v * LANES));
        if (__builtin_expect(any, 0))
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) log.append(z[m][v], pass[v], key + m * PANEL + v * LANES);
    }
}

template <int LATENTS, class... Rest>
inline void tail(long latents, Rest&&... rest) {
    if constexpr (LATENTS > 0) {
        if (latents == LATENTS) product<LATENTS>(rest...);
        else tail<LATENTS - 1>(latents, rest...);
    }
}

// Latents of a group, a whole number of tiles.
inline long group_size(long pairs) {
    const long group = GROUP_BYTES / (pairs * 4) / TILE * TILE;
    return group < TILE ? TILE : group;
}

// All latents against the rows of panels [first, last).
template <class Product>
inline void select_panels(Product& z_of, long n_latents, long group, long first, long last, const Best& best) {
    Log log;
    for (long start = 0; start < n_latents; start += group) {
        const long end = start + group < n_latents ? start + group : n_latents;
        z_of.begin(start, end);
        for (long panel = first; panel < last; panel++) {
            const float* least = best.least + panel * PANEL;
            long j = start;
            for (; j + TILE <= end; j += TILE) {
                product<TILE>(z_of, j, panel, least, (int)((j - start) * PANEL), log);
                if (log.n > Log::SIZE - Log::TILE_MOST) log.drain(best, panel * PANEL, start);
            }
            tail<TILE - 1>(end - j, z_of, j, panel, least, (int)((j - start) * PANEL), log);
            log.drain(best, panel * PANEL, start);
        }
    }
}

// The final k of one row, empty places as (0, -1); sorted: descending, ties by the lower index.
inline void finish(const Best& best, long row, bool sorted, float* values, int* indices) {
    best.cut(row, best.k);
    const long n = best.count[row];
    const float* v = best.values + row * best.capacity;
    const int* ix = best.indices + row * best.capacity;
    for (long i = 0; i < best.k; i++) values[i] = 0, indices[i] = -1;
    for (long i = 0; i < n; i++) {
        long place = i;
        if (sorted) {
            place = 0;
            const V own = splat(v[i]);
            for (long j = 0; j < n; j += LANES) {
                const V other = load(v + j);
                const Bits in = bits_of(lanes(n - j)), before = j > i ? 0 : bits_of(lanes(i - j));
                place += __builtin_popcount(in & greater(other, own));
                place += __builtin_popcount(in & before & equal(other, own));
            }
        }
        values[place] = v[i], indices[place] = ix[i];
    }
}

}  // namespace sae

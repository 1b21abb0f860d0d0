// The update of a matrix whose values or moments are stored compactly (row_state.py, eight_bit.py, stochastic.py).
//
// The bits are those of plain torch, which is the specification: the operations of ordered.py, each rounded once.
// Subnormal numbers, which count as zero here, are aside.
#pragma once

#include <algorithm>

#include "latents.h"

namespace sae {

enum Moments : long { FLOAT32, INT8, FACTORED };

// A matrix [n_latents, d] and its moments as they are stored.
struct Matrix {
    void *value, *first, *second;         // fp32 or bf16; fp32 or codes, factored: no second
    float *first_scale, *second_scale;    // of codes, [n_latents, d / block]
    float* second_row;                    // factored, [n_latents]
    const float* profile;                 // factored, [d]
    double* squares;                      // factored, [blocks(n_latents, CHUNK), d]: sums of a chunk's squared gradients
    long d, block, bf16, moments, first_latent;
    uint64_t keys[3];                     // of the random bits for values, first and second moments
};

// The random bits of one row: stochastic.random_bits.
class RandomBits {
    static constexpr uint32_t GOLDEN = 0x9e3779b9;
    I key, steps = mul(iota(), splat((int)GOLDEN));

    static uint32_t mixed(uint64_t x) {
        x += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return (uint32_t)(x ^ (x >> 31));
    }

   public:
    RandomBits(uint64_t common, long latent) : key(splat((int)mixed(common ^ (uint64_t)latent))) {}

    // Of dimensions i, i + 1, ...
    I operator()(long i) const {
        I x = exclusive(key, add(splat((int)((uint32_t)i * GOLDEN)), steps));
        x = mul(exclusive(x, down<16>(x)), splat(0x7feb352d));
        x = mul(exclusive(x, down<15>(x)), splat((int)0x846ca68b));
        return exclusive(x, down<16>(x));
    }
};

// use(i, lanes) for the vectors from i = begin to end.
template <class Use>
inline void each(long begin, long end, const Use& use) {
    for (long i = begin; i < end; i += LANES) use(i, lanes(end - i));
}

// The sum of x [d], which is lost: ordered.row_sums.
inline float row_sum(float* x, long d) {
    for (long half; d > 1; d = half) {
        half = (d + 1) / 2;
        each(0, d - half, [&](long i, Lanes m) { store(x + i, m, add(load(x + i, m), load(x + half + i, m))); });
    }
    return x[0];
}

// Codes of eight bits: eight_bit.py. The bits of a code's number are the code plus BASE, and 20 zeros.
constexpr float LARGEST = 1.875f, LEAST = 0x1p-15f * 1.125f, LEAST_SCALE = 0x1p-126f;
constexpr int LOW_BITS = (1 << 20) - 1;

template <int BASE>
inline V number_of(I code, V scale) {
    return mul(from_bits(where_less(splat(0), code, up<20>(add(code, splat(BASE))), splat(0))), scale);
}

template <int BASE>
inline I code_of(V y, I low) {
    return sub(down<20>(add(bits(smaller(y, splat(LARGEST))), low)), splat(BASE));
}

struct Signed {  // the highest bit is the sign
    static constexpr int TOP = 127, BASE = 0x3ff - TOP;

    static V decode(I code, V scale) {
        const V size = number_of<BASE>(both(code, splat(TOP)), scale);
        return from_bits(exclusive(bits(size), up<24>(both(code, splat(128)))));
    }
    static I encode(V x, V scale, I random) {
        const V y = div(x, scale), size = abs(y);
        const I low = both(random, splat(LOW_BITS));
        const I above = smaller(code_of<BASE>(size, low), splat(TOP));
        const I below = where_less(low, truncated(mul(size, splat((float)(0x1p20 / LEAST)))), splat(1), splat(0));
        const I code = where_less(size, splat(LEAST), below, above);
        return add(code, where_less(splat(0), code, both(down<24>(bits(y)), splat(128)), splat(0)));
    }
};

struct Unsigned {
    static constexpr int TOP = 255, BASE = 0x3ff - TOP;

    static V decode(I code, V scale) { return number_of<BASE>(code, scale); }
    static I encode(V x, V scale, I random) {
        const I code = code_of<BASE>(div(x, scale), both(random, splat(LOW_BITS)));
        return where_less(zero(), x, smaller(larger(code, splat(1)), splat(TOP)), splat(0));
    }
};

template <class Code>
inline void decode_row(const uint8_t* codes, const float* scales, long block, long d, float* out) {
    for (long b = 0; b < d / block; b++) {
        const V scale = splat(scales[b]);
        each(b * block, (b + 1) * block, [&](long i, Lanes m) {
            store(out + i, m, Code::decode(load_bytes(codes + i, m), scale));
        });
    }
}

template <class Code>
inline void encode_row(const float* x, const RandomBits& random, long block, long d, uint8_t* codes, float* scales) {
    for (long b = 0; b < d / block; b++) {
        const long begin = b * block, end = begin + block;
        V most = zero();
        each(begin, end, [&](long i, Lanes m) { most = larger(most, abs(load(x + i, m))); });
        scales[b] = std::fmax(largest(most) / LARGEST, LEAST_SCALE);
        const V scale = splat(scales[b]);
        each(begin, end, [&](long i, Lanes m) {
            store_bytes(codes + i, m, Code::encode(load(x + i, m), scale, random(i)));
        });
    }
}

inline void store_value(float* p, Lanes m, V v, const RandomBits&, long) { store(p, m, v); }

// To bf16, up or down at random: stochastic.round_bfloat16.
inline void store_value(uint16_t* p, Lanes m, V v, const RandomBits& random, long i) {
    const I raised = add(bits(v), both(random(i), splat(0xffff)));
    const I size = both(bits(v), splat(0x7fffffff)), infinity = splat(0x7f800000);
    const I special = where_less(infinity, size, either(bits(v), splat(0x00400000)), bits(v));  // NaN stays NaN
    store_low_words(p, m, down<16>(where_less(size, infinity, raised, special)));
}

// A thread's room for one row.
struct Workspace {
    std::vector<float> gradient, value, first, second, products;
    explicit Workspace(long d) : gradient(d), value(d), first(d), second(d), products(d) {}

    // The sum of a b, in the order of ordered.row_sums.
    float dot(const float* a, const float* b, long d) {
        each(0, d, [&](long i, Lanes m) { store(&products[i], m, mul(load(a + i, m), load(b + i, m))); });
        return row_sum(products.data(), d);
    }
};

inline V moved(V mean, V to, float share) { return add(mean, mul(sub(to, mean), splat(share))); }

// ordered.adam_ on p, given the new first moment.
inline void adam_step(float* p, const float* g, const float* first, float* second, long d, const Adam& adam) {
    each(0, d, [&](long i, Lanes m) {
        const V gradient = load(g + i, m);
        const V square = mul(mul(gradient, gradient), splat(adam.new2));
        const V v = add(mul(load(second + i, m), splat(adam.beta2)), square);
        const V root = add(sqrt(div(v, splat(adam.bias2))), splat(adam.eps));
        const V step = div(mul(div(load(first + i, m), splat(adam.bias1)), splat(adam.lr)), root);
        store(second + i, m, v);
        store(p + i, m, sub(load(p + i, m), step));
    });
}

// ordered.factored_adam_ on p, given the new first moment.
inline void factored_step(const Matrix& a, long j, float* p, const float* g, const float* first, const Adam& adam,
                          Workspace& w) {
    float* update = w.second.data();
    double* squares = a.squares + j / CHUNK * a.d;
    if (j % CHUNK == 0) std::fill_n(squares, a.d, 0.0);
    for (long i = 0; i < a.d; i++) squares[i] += (double)g[i] * g[i];
    auto square_mean = [&](const float* x) { return w.dot(x, x, a.d) / (float)a.d; };
    float& row = a.second_row[j];
    row += (square_mean(g) - row) * adam.new2;
    const V of_row = splat(row / adam.bias2);
    each(0, a.d, [&](long i, Lanes m) {
        const V root = add(sqrt(mul(of_row, load(a.profile + i, m))), splat(adam.eps));
        store(update + i, m, div(div(load(first + i, m), splat(adam.bias1)), root));
    });
    const V size = splat(std::fmax(std::sqrt(square_mean(update)), 1.0f));
    each(0, a.d, [&](long i, Lanes m) {
        store(p + i, m, sub(load(p + i, m), mul(div(load(update + i, m), size), splat(adam.lr))));
    });
}

// RowState.update_ of row j, from its gradient, of which `any` says whether it may differ from zero.
template <class Value, Moments KIND>
inline void compact_row(const Matrix& a, long j, const float* g, const Adam& adam, bool unit, bool any, Workspace& w) {
    const long d = a.d, n_blocks = d / a.block, latent = a.first_latent + j;
    Value* stored = (Value*)a.value + j * d;
    float *p = w.value.data(), *first = w.first.data(), *second = w.second.data();
    each(0, d, [&](long i, Lanes m) { store(p + i, m, load(stored + i, m)); });
    if (unit && any) {
        const V along = splat(w.dot(g, p, d));
        float* across = w.gradient.data();
        each(0, d, [&](long i, Lanes m) { store(across + i, m, sub(load(g + i, m), mul(along, load(p + i, m)))); });
        g = across;
    }
    uint8_t *first_codes = (uint8_t*)a.first + j * d, *second_codes = (uint8_t*)a.second + j * d;
    float *first_scales = a.first_scale + j * n_blocks, *second_scales = a.second_scale + j * n_blocks;
    if constexpr (KIND == FLOAT32) first = (float*)a.first + j * d, second = (float*)a.second + j * d;
    else decode_row<Signed>(first_codes, first_scales, a.block, d, first);
    each(0, d, [&](long i, Lanes m) { store(first + i, m, moved(load(first + i, m), load(g + i, m), adam.new1)); });
    if constexpr (KIND == INT8) decode_row<Unsigned>(second_codes, second_scales, a.block, d, second);
    if constexpr (KIND == FACTORED) factored_step(a, j, p, g, first, adam, w);
    else adam_step(p, g, first, second, d, adam);
    if constexpr (KIND != FLOAT32)
        encode_row<Signed>(first, {a.keys[1], latent}, a.block, d, first_codes, first_scales);
    if constexpr (KIND == INT8)
        encode_row<Unsigned>(second, {a.keys[2], latent}, a.block, d, second_codes, second_scales);
    if (unit) {
        const V norm = splat(std::fmax(std::sqrt(w.dot(p, p, d)), 1e-12f));
        each(0, d, [&](long i, Lanes m) { store(p + i, m, div(load(p + i, m), norm)); });
    }
    const RandomBits random(a.keys[0], latent);
    each(0, d, [&](long i, Lanes m) { store_value(stored + i, m, load(p + i, m), random, i); });
}

inline void compact_row(const Matrix& a, long j, const float* g, const Adam& adam, bool unit, bool any, Workspace& w) {
    typed(a.value, a.bf16, [&]<class Value>(const Value*) {
        switch (a.moments) {
            case FLOAT32: return compact_row<Value, FLOAT32>(a, j, g, adam, unit, any, w);
            case INT8: return compact_row<Value, INT8>(a, j, g, adam, unit, any, w);
            default: return compact_row<Value, FACTORED>(a, j, g, adam, unit, any, w);
        }
    });
}

}  // namespace sae

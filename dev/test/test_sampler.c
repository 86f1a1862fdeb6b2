/*
The sampler: which tokens survive the filters, and how often each is drawn.

    filters         against a reference that sorts the whole vocabulary and cuts it as the formulas say, in double
    frequencies     chi-square of 200,000 draws with fixed seeds against the exact probabilities
*/
#include <math.h>

#include "test.h"
#include "llmc/error.h"
#include "llmc/sampler.h"

enum { MAX_V = 128256 };
static float logits[MAX_V];
static Candidate scratch[MAX_V];

static SamplerOptions options(double temperature, int top_k, double top_p, double min_p) {
    SamplerOptions o = { (float)temperature, top_k, (float)top_p, (float)min_p };
    return o;
}

static void normal_logits(int V, double scale, uint64_t stream) {
    for (int i = 0; i < V; i++) logits[i] = (float)scale * random_normal(1, stream, (uint64_t)i);
}

// ---- the reference ---------------------------------------------------------------------------

static int by_logit(const void* a, const void* b) {
    int i = *(const int*)a, j = *(const int*)b;
    return logits[i] != logits[j] ? (logits[i] < logits[j] ? 1 : -1) : i - j;
}

// the probability of every token, 0 where it is filtered out; owned by the caller. *near is set when a filter cuts so close
// to a token's value that float and double may differ about it
static double* reference(int V, SamplerOptions o, bool* near) {
    int* order = allocate(V, sizeof *order);
    double *p = allocate(V, sizeof *p), sum = 0;
    for (int i = 0; i < V; i++) order[i] = i;
    qsort(order, V, sizeof *order, by_logit);
    float max = logits[order[0]];
    for (int i = 0; i < V; i++) p[i] = exp(((double)logits[i] - (double)max) / (double)o.temperature);
    *near = false;

    int n = V; // how many of order are left
    if (o.top_k > 0 && o.top_k < V)
        for (n = o.top_k; n < V && logits[order[n]] == logits[order[o.top_k - 1]];) n++;
    for (int i = 0; i < n; i++) sum += p[order[i]];
    if (o.top_p < 1) {
        double before = 0, limit = (double)o.top_p * sum;
        for (int i = 0; i < n; i++) {
            if (i > 0 && fabs(before - limit) < 1e-5 * sum) *near = true;
            if (i > 0 && before >= limit) n = i;
            before += p[order[i]];
        }
    }
    for (int i = 1; i < n; i++) {
        if (fabs(p[order[i]] - (double)o.min_p) < 1e-5 * (double)o.min_p) *near = true;
        if (p[order[i]] < (double)o.min_p) n = i;
    }

    double total = 0;
    for (int i = 0; i < n; i++) total += p[order[i]];
    for (int i = 0; i < V; i++) p[order[i]] = i < n ? p[order[i]] / total : 0;
    free(order);
    return p;
}

// ---- filters ---------------------------------------------------------------------------------

// the filters keep exactly the tokens that the reference keeps, or up to slack more or fewer: among 128,256 tokens there is
// always one that a cut misses by less than rounding. Without slack returns whether the cut was clear enough to compare
static bool check_filter(int V, SamplerOptions o, int slack) {
    bool near;
    double* want = reference(V, o, &near);
    double total;
    int n = candidates_make(scratch, &total, logits, V, logits[sample_greedy(logits, V)], &o);
    int kept = candidates_filter(scratch, n, total, &o), expected = 0;
    for (int i = 0; i < V; i++) expected += want[i] > 1e-300;
    bool ok = abs(kept - expected) <= slack;
    for (int i = 0; i < kept && i < expected && ok; i++) {
        Candidate c = scratch[n - 1 - i];
        ok = want[c.id] > 0 && (i == 0 || candidate_before(scratch[n - i], c)); // kept, in order, none twice
    }
    free(want);
    if (!ok && (slack || !near))
        test_fail("V %d temperature %g top-k %d top-p %g min-p %g: kept %d, expected %d", V, (double)o.temperature,
                  o.top_k, (double)o.top_p, (double)o.min_p, kept, expected);
    return !near;
}

static void test_filters(void** state) {
    (void)state;
    const int sizes[] = { 1, 2, 3, 10, 33, 1000 }, ks[] = { 0, 1, 2, 5, 40, 999, 5000 };
    const double ps[] = { 1, 0.99, 0.9, 0.5, 0.1, 1e-6, 0 }, ms[] = { 0, 0.001, 0.05, 0.5, 1 }, ts[] = { 0.5, 1, 2 };
    int checked = 0, all = 0;
    for (int s = 0; s < 6; s++)
        for (int k = 0; k < 7; k++)
            for (int p = 0; p < 7; p++)
                for (int m = 0; m < 5; m++)
                    for (int t = 0; t < 3; t++) {
                        normal_logits(sizes[s], 3, (uint64_t)(s * 3 + t));
                        checked += check_filter(sizes[s], options(ts[t], ks[k], ps[p], ms[m]), 0);
                        all++;
                    }
    assert_true(checked > all * 0.97); // the others cut within rounding of a token
}

// equal logits: top-k keeps all that equal the k-th, top-p takes them by index
static void test_ties(void** state) {
    (void)state;
    for (int i = 0; i < 100; i++) logits[i] = (float)(i % 4);
    for (int k = 0; k <= 100; k += 5) assert_true(check_filter(100, options(1, k, 1, 0), 0));
    for (int i = 0; i < 8; i++) logits[i] = 0; // each exactly an eighth
    Candidate* end = scratch + 8;
    SamplerOptions half = options(1, 0, 0.5, 0);
    for (int i = 0; i < 8; i++) scratch[i].p = 1, scratch[i].id = i;
    assert_int_equal(candidates_filter(scratch, 8, 8, &half), 4);
    for (int i = 0; i < 4; i++) assert_int_equal(end[-1 - i].id, i);
    SamplerOptions k3 = options(1, 3, 1, 0);
    for (int i = 0; i < 8; i++) scratch[i].p = 1, scratch[i].id = i;
    assert_int_equal(candidates_filter(scratch, 8, 8, &k3), 8);
}

// transformers' order, by hand: p = 8 4 2 1 1 (sixteenths). top-k 2 leaves 8 4, of which 0.6 is reached by the first alone;
// were top-p first, it would keep 8 4 and top-k would drop none. min-p 0.4 keeps what is at least 0.4 of the largest
static void test_order(void** state) {
    (void)state;
    const float p[5] = { 8, 4, 2, 1, 1 };
    const struct {
        SamplerOptions o;
        int kept;
    } cases[] = {
        { options(1, 2, 0.6, 0), 1 },   { options(1, 0, 0.6, 0), 2 },    { options(1, 2, 0.7, 0), 2 },
        { options(1, 0, 1, 0.4), 2 },   { options(1, 0, 1, 0.25), 3 },   { options(1, 0, 1, 0.26), 2 },
        { options(1, 3, 0.8, 0.3), 2 }, { options(1, 4, 0.99, 0.1), 5 }, { options(1, 1, 0, 1), 1 },
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        for (int i = 0; i < 5; i++) scratch[i].p = p[i] / 8, scratch[i].id = i;
        assert_int_equal(candidates_filter(scratch, 5, 2, &cases[c].o), cases[c].kept);
    }
}

// ---- frequencies -----------------------------------------------------------------------------

// chi-square of n draws against the reference: below the 1 - 1e-6 quantile (Wilson and Hilferty's approximation). Tokens
// expected fewer than ten times share a cell; a token that the reference excludes must never come
static void check_frequencies(int V, SamplerOptions o, uint64_t seed) {
    enum { DRAWS = 200000 };
    bool near;
    double *p = reference(V, o, &near), chi = 0, rare = 0, rare_p = 0;
    assert_false(near);
    int cells = 0, *count = allocate(V, sizeof *count);
    for (uint64_t i = 0; i < DRAWS; i++) {
        int id = sample(logits, V, &o, seed, i, scratch);
        assert_in_range(id, 0, V - 1);
        count[id]++;
    }
    for (int i = 0; i < V; i++) {
        double expected = p[i] * DRAWS;
        if (count[i] && p[i] == 0) test_fail("token %d was drawn, but is filtered out", i);
        if (expected < 10)
            rare += count[i], rare_p += p[i];
        else
            chi += (count[i] - expected) * (count[i] - expected) / expected, cells++;
    }
    if (rare_p * DRAWS >= 10) chi += pow(rare - rare_p * DRAWS, 2) / (rare_p * DRAWS), cells++;
    assert_true(cells > 1);
    double f = cells - 1, limit = f * pow(1 - 2 / (9 * f) + 4.753 * sqrt(2 / (9 * f)), 3);
    if (!(chi <= limit)) test_fail("chi-square %.1f of %d cells, at most %.1f expected", chi, cells, limit);
    free(p), free(count);
}

static void test_frequencies(void** state) {
    (void)state;
    normal_logits(50, 2, 7);
    check_frequencies(50, options(1, 0, 1, 0), 1);
    check_frequencies(50, options(0.7, 0, 1, 0), 2);
    check_frequencies(50, options(1.5, 10, 1, 0), 3);
    check_frequencies(50, options(1, 0, 0.8, 0), 4);
    check_frequencies(50, options(1, 0, 1, 0.1), 5);
    check_frequencies(50, options(1.2, 20, 0.9, 0.05), 6);
    check_frequencies(50, options(1e9, 0, 1, 0), 7);
    for (int i = 0; i < 10; i++) logits[i] = i % 3 ? -INFINITY : 0; // only 0, 3, 6, 9, equally
    check_frequencies(10, options(1, 0, 1, 0), 8);
    check_frequencies(10, options(1, 3, 0.99, 0.5), 9);
}

// ---- edges -----------------------------------------------------------------------------------

static void test_greedy(void** state) {
    (void)state;
    const SamplerOptions greedy = options(0, 5, 0.5, 0.5);
    normal_logits(1000, 1, 3);
    logits[123] = logits[700] = 50;
    assert_int_equal(sample(logits, 1000, &greedy, 1, 0, scratch), 123);
    for (int i = 0; i < 1000; i++) logits[i] = -1e30f;
    assert_int_equal(sample(logits, 1000, &greedy, 1, 0, scratch), 0);
    logits[0] = 3;
    assert_int_equal(sample(logits, 1, &greedy, 1, 0, scratch), 0);
}

static void test_extremes(void** state) {
    (void)state;
    const double temperatures[] = { 0, 1e-40, 1e-30, 1e-6, 1, 1e6, 1e30, INFINITY };
    for (int t = 0; t < 8; t++)
        for (int filtered = 0; filtered < 2; filtered++) {
            SamplerOptions o = filtered ? options(temperatures[t], 7, 0.9, 0.01) : options(temperatures[t], 0, 1, 0);
            for (int i = 0; i < 100; i++) logits[i] = -INFINITY;
            logits[42] = -3e38f; // all impossible but one
            for (uint64_t i = 0; i < 100; i++) assert_int_equal(sample(logits, 100, &o, 1, i, scratch), 42);
            logits[43] = 3e38f; // the difference overflows
            if (temperatures[t] < 1e7)
                for (uint64_t i = 0; i < 100; i++) assert_int_equal(sample(logits, 100, &o, 1, i, scratch), 43);
            normal_logits(100, 1, 4);
            if (temperatures[t] < 1e-5) // as good as greedy
                for (uint64_t i = 0; i < 100; i++)
                    assert_int_equal(sample(logits, 100, &o, 1, i, scratch), sample_greedy(logits, 100));
        }
}

// what is no number is reported wherever it stands, and so is a distribution without any token
static void test_bad_logits(void** state) {
    (void)state;
    const float bad[] = { NAN, -NAN, INFINITY };
    const SamplerOptions all[] = { options(0, 0, 1, 0), options(1, 0, 1, 0), options(1, 5, 0.5, 0.1) };
    for (int o = 0; o < 3; o++) {
        for (int b = 0; b < 3; b++)
            for (int at = 0; at < 10; at++) {
                normal_logits(10, 1, 5);
                assert_in_range(sample(logits, 10, &all[o], 1, 0, scratch), 0, 9);
                logits[at] = bad[b];
                assert_int_equal(sample(logits, 10, &all[o], 1, 0, scratch), -1);
            }
        for (int i = 0; i < 10; i++) logits[i] = -INFINITY;
        assert_int_equal(sample(logits, 10, &all[o], 1, 0, scratch), -1);
    }
}

// the same (seed, index) draws the same token, others draw others
static void test_repeatable(void** state) {
    (void)state;
    SamplerOptions o = options(1, 0, 1, 0);
    normal_logits(1000, 1, 6);
    int same_seed = 0, same_index = 0;
    for (uint64_t i = 0; i < 200; i++) {
        int id = sample(logits, 1000, &o, 5, i, scratch);
        assert_int_equal(id, sample(logits, 1000, &o, 5, i, scratch));
        same_seed += id == sample(logits, 1000, &o, 5, i + 1, scratch);
        same_index += id == sample(logits, 1000, &o, 6, i, scratch);
    }
    assert_true(same_seed < 20 && same_index < 20);
}

// Llama 3's vocabulary, filters that cut much, little and nothing
static void test_large(void** state) {
    (void)state;
    normal_logits(MAX_V, 3, 8);
    check_filter(MAX_V, options(1, 50, 1, 0), 3);
    check_filter(MAX_V, options(0.8, 0, 0.95, 0), 3);
    check_filter(MAX_V, options(1, 100000, 0.9, 1e-4), 3);
    check_filter(MAX_V, options(1, 0, 1, 0.05), 3);
    for (int i = 0; i < MAX_V; i++) logits[i] = 0;
    check_filter(MAX_V, options(1, 1, 1, 0), 3);
    check_filter(MAX_V, options(1, 0, 0.5, 0), 3);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_filters),     cmocka_unit_test(test_ties),       cmocka_unit_test(test_order),
        cmocka_unit_test(test_frequencies), cmocka_unit_test(test_greedy),     cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_bad_logits),  cmocka_unit_test(test_repeatable), cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

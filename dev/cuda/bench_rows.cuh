/*
The rows of the lab's tables: how one is checked, timed and printed. See bench.cuh, which includes this.
*/
#pragma once

// ---- the run ---------------------------------------------------------------------------------

struct BenchOptions {
    std::vector<std::string> only;
    std::string shape, json, csv;
    bool check, profile, small;
    int block; // of --profile; 0: the first in the row
    double time_limit;
    uint64_t seed;
};

// one variant on one problem
struct BenchCandidate {
    const char* name;
    const char* kind; // variant, production, yardstick
    const char* what;
    std::vector<int> blocks;
    std::function<void(int block, cudaStream_t stream)> launch;
    std::string refusal;
    bool selected;
};

// 0: what the others are compared with, when it is there
static inline int bench_rank(const BenchCandidate* v) {
    return strcmp(v->kind, "production") == 0 ? 0 : strcmp(v->kind, "yardstick") == 0 ? 1 : 2;
}

struct BenchRow {
    std::string check; // ok, WRONG …, not here: …
    bool timed, once;
    int block;
    double us, spread, used;
};

struct BenchCopies {
    std::vector<float> us;
};

// all of a program
struct BenchRun {
    const char* op;
    const char* yardstick;
    BenchOptions options;
    std::string gpu;
    std::map<std::string, std::string> wrong; // variants, and what was first found
    std::map<size_t, BenchCopies> copies;     // by bytes
    double start, deadline;                   // of the shape at hand
    bool quiet;
    Bench bench;
    // of the shape at hand
    const Shape* shape;
    std::vector<BenchCandidate> candidates;
    std::vector<BenchRow> rows;
    double traffic, flops;
    bool table;          // there is one to be printed
    const char* running; // the variant that runs now, or NULL
    int running_block;
};

static BenchRun* bench_run; // for what is said when the program ends early

static inline std::string bench_sizes(const Shape* s, const char* format) {
    const char* letters[] = { "B", "T", "N", "C", "NH", "NKV", "HD", "F", "V" };
    const int sizes[] = { s->B, s->T, s->N, s->C, s->NH, s->NKV, s->HD, s->F, s->V };
    std::string text;
    for (int i = 0; i < 9; i++)
        if (sizes[i]) {
            if (!text.empty()) text += format[0] == '"' ? "," : "  ";
            char one[64];
            snprintf(one, sizeof one, format[0] == '"' ? "\"%s\":%d" : "%s %d", letters[i], sizes[i]);
            text += one;
        }
    return text;
}

// ---- checks ----------------------------------------------------------------------------------

// waits for the GPU; a fault is told with the variant's name, and ends the program (see bench_ended)
static inline void bench_wait(BenchRun* run) {
    cudaError_t code = cudaGetLastError();
    if (code == cudaSuccess) code = cudaDeviceSynchronize();
    if (code == cudaSuccess) return;
    const std::string message = bench_text("WRONG %s (%s)", cudaGetErrorString(code), cudaGetErrorName(code));
    for (size_t i = 0; i < run->candidates.size() && run->running; i++)
        if (run->candidates[i].name == run->running && i < run->rows.size()) run->rows[i].check = message;
    fprintf(stderr, "error: %s\n", message.c_str() + 6);
    fflush(NULL);
    exit(BENCH_FAULT);
}

static inline std::string bench_wrong(const BenchArray* a, size_t i, double got, double want, double allowed,
                                      size_t bad, size_t n, const char* beside) {
    const std::string wrote = isnan(got) ? "nan" : bench_text("%.6g", got); // of either sign
    std::string text = bench_text("%s[%zu]: got %s, want %.6g", a->name, i, wrote.c_str(), want);
    if (!a->type->exact) text += bench_text(", tolerance %.2g", allowed);
    return text + bench_text("; %zu of %zu bad%s", bad, n, beside);
}

// what the CPU expects of an output, beside what is there; empty: all is well
static inline std::string bench_check_expected(const BenchArray* a, double* used) {
    static std::vector<double> got; // kept from call to call: it may be large
    static std::vector<char> bits;
    const size_t size = a->bytes / a->n;
    size_t n_expected = 0, bad = 0;
    double scale = 0, worst = 0, first_got = 0, first_want = 0;
    long long first = -1;
    for (const BenchExpected& e : a->expected)
        for (double x : e.values) scale = fmax(scale, fabs(x)); // NaN is found below
    const double allowed = a->type->exact ? 0 : a->tolerance * (scale == 0 ? 1 : scale);
    for (const BenchExpected& e : a->expected) {
        const size_t n = e.values.size();
        n_expected += n;
        if (bits.size() < n * size) bits.resize(n * size);
        if (got.size() < n) got.resize(n);
        cuda_check(cudaMemcpy(bits.data(), a->data + e.first * size, n * size, cudaMemcpyDeviceToHost));
        a->type->to_doubles(got.data(), bits.data(), n);
        const double *g = got.data(), *w = e.values.data();
        size_t bad_here = 0, first_here = n;
#pragma omp parallel for reduction(+ : bad_here) reduction(min : first_here) reduction(max : worst) if (n > 1 << 16)
        for (size_t i = 0; i < n; i++) {
            const double error = fabs(g[i] - w[i]);
            const bool ok = check_finite(g[i]) && check_finite(w[i]) && error <= allowed;
            if (!ok) bad_here++, first_here = std::min(first_here, i);
            if (ok && error > worst) worst = error;
        }
        if (bad_here && first < 0)
            first = (long long)(e.first + first_here), first_got = g[first_here], first_want = w[first_here];
        bad += bad_here;
    }
    if (allowed > 0) *used = fmax(*used, worst / allowed);
    return bad ? bench_wrong(a, (size_t)first, first_got, first_want, allowed, bad, n_expected, "") : "";
}

static inline double bench_number_at(const BenchArray* a, const char* memory, size_t i) {
    const size_t size = a->bytes / a->n;
    char bits[8];
    double value;
    cuda_check(cudaMemcpy(bits, memory + i * size, size, cudaMemcpyDeviceToHost));
    a->type->to_doubles(&value, bits, 1);
    return value;
}

// what the trusted variant wrote, beside what is there
static inline std::string bench_check_trusted(Bench* b, const BenchArray* a, double* used) {
    const double allowed = 2 * a->tolerance * a->trusted_scale;
    BenchFound found = b->look([&](BenchFound* f) { a->type->compare(a, (float)allowed, f, b->stream); });
    float worst;
    memcpy(&worst, &found.worst, 4);
    *used = fmax(*used, worst);
    if (!found.bad) return "";
    return bench_wrong(a, found.first, bench_number_at(a, a->data, found.first),
                       bench_number_at(a, a->trusted, found.first), allowed, found.bad, a->n,
                       " beside the reference row");
}

// keeps what was written, against which the other variants are compared; empty: it is all finite
static inline std::string bench_trust(Bench* b) {
    for (BenchArray& a : b->arrays) {
        if (!a.compared() || !a.n) continue;
        BenchFound found = b->look([&](BenchFound* f) { a.type->scale(&a, f, b->stream); });
        if (found.bad)
            return bench_text("%s[%llu]: got %s; %llu of %zu are not finite", a.name, found.first,
                              isnan(bench_number_at(&a, a.data, found.first)) ? "nan" : "inf", found.bad, a.n);
        float scale;
        memcpy(&scale, &found.worst, 4);
        a.trusted_scale = scale == 0 ? 1 : scale;
    }
    for (BenchArray& a : b->arrays)
        if (a.compared() && a.n) {
            a.trusted = bench_allocate(a.bytes);
            cuda_check(cudaMemcpyAsync(a.trusted, a.data, a.bytes, cudaMemcpyDeviceToDevice, b->stream));
        }
    return "";
}

// the outputs as they are now
static inline std::string bench_check_outputs(Bench* b, double* used) {
    for (BenchArray& a : b->arrays) {
        if (!a.compared() || !a.n) continue;
        std::string wrong = bench_check_expected(&a, used);
        if (wrong.empty() && a.trusted) wrong = bench_check_trusted(b, &a, used);
        if (!wrong.empty()) return wrong;
    }
    return "";
}

// fences and inputs; what was changed is set right again
static inline std::string bench_check_untouched(Bench* b) {
    std::string wrong;
    for (BenchArray& a : b->arrays) {
        const char* fences[2] = { a.memory, a.data + a.bytes };
        for (int after = 0; after < 2; after++) {
            BenchFound found = b->look([&](BenchFound* f) {
                bench_fence_kernel<<<16, 256, 0, b->stream>>>((const uint8_t*)fences[after], f);
                launch_check();
            });
            if (!found.bad) continue;
            if (wrong.empty())
                wrong = bench_text("%s: %llu bytes were written in the fence %s it, the first at byte %lld", a.name,
                                   found.bad, after ? "after" : "before",
                                   after ? (long long)(a.bytes + found.first) : (long long)found.first - BENCH_FENCE);
            cuda_check(cudaMemsetAsync((void*)fences[after], 0xff, BENCH_FENCE, b->stream));
        }
        if (a.role == BENCH_INPUT && a.n && b->sum_of(&a) != a.sum) {
            if (wrong.empty()) wrong = bench_text("%s: an input was changed", a.name);
            a.fill();
            cuda_check(cudaStreamSynchronize(b->stream));
        }
    }
    return wrong;
}

// on a small shape, all of every output is expected or left open
static inline void bench_require_expected(BenchRun* run) {
    for (const BenchArray& a : run->bench.arrays) {
        if (!a.compared()) continue;
        size_t expected = a.n_open;
        for (const BenchExpected& e : a.expected) expected += e.values.size();
        if (expected < a.n)
            die("%s, shape %s: reference expects %zu of the %zu numbers of %s", run->op, run->shape->name, expected,
                a.n, a.name);
    }
}

// one launch, with everything around it checked
static inline std::string bench_checked_launch(BenchRun* run, const BenchCandidate* v, int block, double* used) {
    Bench* b = &run->bench;
    bench_delay_kernel<<<1, 1, 0, b->stream>>>(300000);
    launch_check();
    b->restore();
    b->poison();
    run->running = v->name, run->running_block = block;
    v->launch(block, b->stream);
    bench_wait(run);
    run->running = NULL;
    std::string wrong = bench_check_untouched(b);
    return wrong.empty() ? bench_check_outputs(b, used) : wrong;
}

// all block sizes; fills in row->check
static inline bool bench_check(BenchRun* run, const BenchCandidate* v, BenchRow* row, bool trust) {
    row->used = 0;
    for (size_t i = 0; i < v->blocks.size() || i < 2; i++) {
        const int block = v->blocks[i < v->blocks.size() ? i : 0];
        std::string wrong = bench_checked_launch(run, v, block, &row->used);
        if (wrong.empty() && trust && i == 0) wrong = bench_trust(&run->bench);
        if (wrong.empty()) continue;
        row->block = block;
        row->check = "WRONG " + wrong;
        if (i >= v->blocks.size()) row->check += "; at the second launch alone";
        run->wrong.emplace(v->name, wrong);
        return false;
    }
    row->check = "ok";
    return true;
}

// ---- times -----------------------------------------------------------------------------------

static inline double bench_quantile(std::vector<float> x, double q) {
    std::sort(x.begin(), x.end());
    return x[(size_t)(q * (double)(x.size() - 1) + 0.5)];
}

// what lies between two variants in a profile
static __global__ void bench_next_variant_kernel(void) {}

static inline void bench_flush(cudaStream_t stream) {
    static int4* memory;
    static size_t bytes;
    if (!memory) {
        int device, l2;
        cuda_check(cudaGetDevice(&device));
        cuda_check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
        bytes = std::max<size_t>((size_t)1 << 27, 3 * (size_t)l2);
        cuda_check(cudaMalloc((void**)&memory, bytes));
        cuda_check(cudaMemset(memory, 0, bytes));
        cuda_check(cudaDeviceSynchronize());
    }
    bench_flush_kernel<<<(unsigned)(4 * gpu_processors()), 512, 0, stream>>>(memory, bytes / 16);
    launch_check();
}

// launches in a row, a pair of events around each
struct BenchTimer {
    enum { MOST = 2 * BENCH_LAUNCHES };
    cudaEvent_t events[2 * MOST];
    int n, owner[MOST];
    BenchTimer(void) {
        for (cudaEvent_t& e : events) cuda_check(cudaEventCreate(&e));
        n = 0;
    }
    template <typename F>
    void add(int who, double host_us, cudaStream_t stream, F launch) {
        bench_flush(stream);
        if (host_us > 20) { // longer than the flush keeps the GPU busy: let it wait for the host
            bench_delay_kernel<<<1, 1, 0, stream>>>((unsigned long long)(1500 * std::min(host_us, 5000.0)));
            launch_check();
        }
        cuda_check(cudaEventRecord(events[2 * n], stream));
        launch();
        cuda_check(cudaEventRecord(events[2 * n + 1], stream));
        owner[n++] = who;
    }
    // waits; adds the times of each owner to its list
    void take(BenchRun* run, std::vector<float>* lists[2]) {
        bench_wait(run);
        for (int i = 0; i < n; i++) {
            float ms;
            cuda_check(cudaEventElapsedTime(&ms, events[2 * i], events[2 * i + 1]));
            lists[owner[i]]->push_back(1e3f * ms);
        }
        n = 0;
    }
};

// n launches of a variant, and copies of as many bytes between them; returns how long the host takes for a launch, in us
static inline double bench_time_some(BenchRun* run, const BenchCandidate* v, int block, int n, int copies,
                                     double host_us, std::vector<float>* us) {
    static BenchTimer* timer = new BenchTimer;
    static char *from, *to;
    static size_t room;
    Bench* b = &run->bench;
    const size_t half = (size_t)(run->traffic / 2);
    double host = 0;
    if (copies && room < half) {
        cudaFree(from), cudaFree(to);
        from = to = NULL, room = 0;
        from = bench_allocate(half), to = bench_allocate(half), room = half;
        cuda_check(cudaMemsetAsync(from, 0, half, b->stream));
    }
    run->running = v->name, run->running_block = block;
    for (int i = 0; i < n; i++) {
        if (copies && i * copies / n != (i - 1) * copies / n)
            timer->add(1, 0, b->stream,
                       [&] { cuda_check(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, b->stream)); });
        b->restore();
        timer->add(0, host_us, b->stream, [&] {
            const double start = bench_seconds();
            v->launch(block, b->stream);
            host = bench_seconds() - start;
        });
    }
    std::vector<float>* lists[2] = { us, copies ? &run->copies[half].us : us };
    timer->take(run, lists);
    run->running = NULL;
    return 1e6 * host;
}

// the best block size, then its figures. A slow variant's tries count among them
static inline void bench_time(BenchRun* run, const BenchCandidate* v, BenchRow* row) {
    Bench* b = &run->bench;
    const bool copies = run->flops == 0;
    const double share = 1e6 * BENCH_ROW_SECONDS / (double)(v->blocks.size() + 1);
    double best = 0, best_host = 0;
    std::vector<float> us;
    for (int block : v->blocks) {
        std::vector<float> tries;
        const double host_us = bench_time_some(run, v, block, 1, 0, 0, &tries);
        if (tries[0] < share) {
            const int n = (int)std::min<double>(BENCH_TRIES, std::max(1.0, share / (tries[0] + 100 + host_us)));
            tries.clear();
            bench_time_some(run, v, block, n, 0, host_us, &tries);
        }
        const double median = bench_quantile(tries, 0.5);
        if (best == 0 || median < best) best = median, row->block = block, us = tries, best_host = host_us;
    }
    if (best < 1e6 * BENCH_ROW_SECONDS) {
        const double each = best + 100 + best_host + (copies ? 0.2 * best : 0);
        int n = (int)std::min<double>(BENCH_LAUNCHES, std::max(3.0, 1e6 * BENCH_ROW_SECONDS / each));
        if (n <= BENCH_TRIES)
            n -= (int)us.size();
        else
            us.clear();
        if (n > 0) bench_time_some(run, v, row->block, n, copies ? std::max(n / 5, 1) : 0, best_host, &us);
    }
    row->timed = true, row->once = us.size() < 3;
    row->us = bench_quantile(us, 0.5);
    row->spread = row->once ? 0 : 100 * (bench_quantile(us, 0.9) - bench_quantile(us, 0.1)) / row->us;
    std::string wrong = bench_check_untouched(b);
    if (wrong.empty()) wrong = bench_check_outputs(b, &row->used);
    if (wrong.empty()) return;
    row->timed = false;
    row->check = "WRONG " + wrong + "; after " + std::to_string(us.size()) + " launches in a row";
    run->wrong.emplace(v->name, wrong);
}

// ---- what is said ----------------------------------------------------------------------------

static inline std::string bench_json_text(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if ((unsigned char)c < 32)
            out += ' ';
        else
            out += c;
    }
    return out + "\"";
}

static inline std::string bench_csv_text(const std::string& text) {
    std::string out = "\"";
    for (char c : text) out += c == '"' ? "\"\"" : c == '\n' ? " " : std::string(1, c);
    return out + "\"";
}

struct BenchFigures {
    double copy_us, peak_us, reference_us; // 0: there is none
    const char* reference;                 // the row that the others are measured by
};

// production is the reference; where it is not timed, the yardstick; else the last row
static inline BenchFigures bench_figures(const BenchRun* run) {
    BenchFigures f = { 0, 0, 0, "production" };
    auto copies = run->copies.find((size_t)(run->traffic / 2));
    if (run->flops == 0 && copies != run->copies.end() && !copies->second.us.empty())
        f.copy_us = f.peak_us = bench_quantile(copies->second.us, 0.5);
    int best = 3;
    for (size_t i = run->rows.size(); i-- > 0;) {
        const BenchCandidate* v = &run->candidates[i];
        const int rank = bench_rank(v);
        if (!run->rows[i].timed) continue;
        if (run->flops > 0 && strcmp(v->name, run->yardstick) == 0) f.peak_us = run->rows[i].us;
        if (rank < best) best = rank, f.reference = v->name, f.reference_us = run->rows[i].us;
    }
    return f;
}

static inline void bench_write_rows(const BenchRun* run, const BenchFigures* f) {
    FILE* json = run->options.json.empty() ? NULL : fopen(run->options.json.c_str(), "a");
    FILE* csv = run->options.csv.empty() ? NULL : fopen(run->options.csv.c_str(), "a");
    if (!run->options.json.empty() && !json) die("--json %s: %s", run->options.json.c_str(), strerror(errno));
    if (!run->options.csv.empty() && !csv) die("--csv %s: %s", run->options.csv.c_str(), strerror(errno));
    const char* rate_name = run->flops > 0 ? "TFLOPs" : "GBps";
    if (csv && fseek(csv, 0, SEEK_END) == 0 && ftell(csv) == 0)
        fprintf(csv, "op,shape,dtype,variant,kind,check,block,median_us,spread_percent,GBps,TFLOPs,percent_of_peak,"
                     "times_production,what,gpu\n");
    for (size_t i = 0; i < run->rows.size(); i++) {
        const BenchCandidate* v = &run->candidates[i];
        const BenchRow* r = &run->rows[i];
        if (!v->selected || r->check.empty()) continue;
        const double rate = !r->timed ? 0 : run->flops > 0 ? run->flops / r->us * 1e-6 : run->traffic / r->us * 1e-3;
        const double percent = r->timed && f->peak_us > 0 ? 100 * f->peak_us / r->us : 0;
        const double times = r->timed && f->reference_us > 0 ? f->reference_us / r->us : 0;
        if (json) {
            fprintf(
                json,
                "{\"op\":%s,\"shape\":%s,\"sizes\":{%s},\"dtype\":\"%s\",\"variant\":%s,\"kind\":\"%s\",\"check\":%s",
                bench_json_text(run->op).c_str(), bench_json_text(run->shape->name).c_str(),
                bench_sizes(run->shape, "\"").c_str(), BENCH_DTYPE, bench_json_text(v->name).c_str(), v->kind,
                bench_json_text(r->check).c_str());
            fprintf(json, ",\"used_percent\":%.1f,\"block\":%d", 100 * r->used, r->block);
            if (r->timed)
                fprintf(json, ",\"median_us\":%.3f,\"spread_percent\":%.2f,\"%s\":%.2f", r->us, r->spread, rate_name,
                        rate);
            if (r->once) fprintf(json, ",\"once\":true");
            if (percent > 0) fprintf(json, ",\"percent_of_peak\":%.2f", percent);
            if (times > 0) fprintf(json, ",\"times_production\":%.4f", times);
            if (f->copy_us > 0) fprintf(json, ",\"copy_GBps\":%.1f", run->traffic / f->copy_us * 1e-3);
            fprintf(json, ",\"work\":%.6g,\"what\":%s,\"gpu\":%s,\"seed\":%llu}\n",
                    run->flops > 0 ? run->flops : run->traffic, bench_json_text(v->what).c_str(),
                    bench_json_text(run->gpu).c_str(), (unsigned long long)run->options.seed);
        }
        if (csv)
            fprintf(csv, "%s,%s,%s,%s,%s,%s,%d,%.3f,%.2f,%.2f,%.2f,%.2f,%.4f,%s,%s\n", run->op,
                    bench_csv_text(run->shape->name).c_str(), BENCH_DTYPE, bench_csv_text(v->name).c_str(), v->kind,
                    bench_csv_text(r->check).c_str(), r->block, r->us, r->spread, run->flops > 0 ? 0 : rate,
                    run->flops > 0 ? rate : 0, percent, times, bench_csv_text(v->what).c_str(),
                    bench_csv_text(run->gpu).c_str());
    }
    if (json && fclose(json) != 0) die("--json %s: %s", run->options.json.c_str(), strerror(errno));
    if (csv && fclose(csv) != 0) die("--csv %s: %s", run->options.csv.c_str(), strerror(errno));
}

// the table of the shape at hand, as far as it is known; once
static inline void bench_print(BenchRun* run) {
    if (!run->table || run->quiet) return;
    run->table = false;
    const BenchFigures f = bench_figures(run);
    const Shape* s = run->shape;
    int width = 12;
    for (const BenchCandidate& v : run->candidates) width = std::max(width, (int)strlen(v.name));
    printf("\n%s   %s   %s: %s   ", run->op, BENCH_DTYPE, s->name, bench_sizes(s, "").c_str());
    if (run->flops > 0)
        printf("%.4g TFLOP", run->flops * 1e-12);
    else
        printf("must move %.1f MB", run->traffic * 1e-6);
    if (f.copy_us > 0) printf("   copy %.0f GB/s", run->traffic / f.copy_us * 1e-3);
    if (run->flops > 0 && f.peak_us > 0) printf("   %s %.1f TFLOP/s", run->yardstick, run->flops / f.peak_us * 1e-6);
    printf("   %s   seed %llu\n", run->gpu.c_str(), (unsigned long long)run->options.seed);
    bool any_timed = false;
    for (const BenchRow& r : run->rows) any_timed |= r.timed;
    if (!any_timed)
        printf("  %-*s  check\n", width, "variant");
    else
        printf("  %-*s  %-8s %5s  %10s  %7s  %9s  %9s  %12s   what changed\n", width, "variant", "check", "block",
               "median us", "spread", run->flops > 0 ? "TFLOP/s" : "GB/s", "% of peak",
               (std::string("x ") + f.reference).c_str());
    for (size_t i = 0; i < run->rows.size(); i++) {
        const BenchCandidate* v = &run->candidates[i];
        const BenchRow* r = &run->rows[i];
        if (!v->selected || r->check.empty()) continue;
        char block[16] = "-", spread[16] = "once", used[16] = "";
        if (r->block) snprintf(block, sizeof block, "%d", r->block);
        if (!r->once) snprintf(spread, sizeof spread, "%.1f %%", r->spread);
        if (r->check == "ok") snprintf(used, sizeof used, " %.0f%%", 100 * r->used);
        printf("  %-*s  ", width, v->name);
        if (!r->timed) {
            printf("%s%s%s\n", r->check.c_str(), used,
                   r->check == "ok" ? "   not timed"
                   : r->block       ? (std::string("   block ") + block).c_str()
                                    : "");
            continue;
        }
        printf("%-8s %5s  %10.*f  %7s  ", (r->check + used).c_str(), block,
               r->us < 10     ? 3
               : r->us < 1000 ? 2
                              : 1,
               r->us, spread);
        printf(run->flops > 0 ? "%9.1f  " : "%9.0f  ",
               run->flops > 0 ? run->flops / r->us * 1e-6 : run->traffic / r->us * 1e-3);
        if (f.peak_us > 0)
            printf("%9.1f  ", 100 * f.peak_us / r->us);
        else
            printf("%9s  ", "-");
        if (f.reference_us > 0)
            printf("%12.2f   ", f.reference_us / r->us);
        else
            printf("%12s   ", "-");
        printf("%s\n", v->what);
    }
    fflush(stdout);
    bench_write_rows(run, &f);
}

// when a launcher ends the program, or a fault does
static inline void bench_ended(void) {
    BenchRun* run = bench_run;
    if (!run || !run->running) return;
    fprintf(stderr, "error: %s: variant %s, block %d, shape %s (%s): the program ends here\n", run->op, run->running,
            run->running_block, run->shape->name, bench_sizes(run->shape, "").c_str());
    run->running = NULL;
    bench_print(run);
}

#!/usr/bin/env python3
"""
The kernel lab's report, in two steps that may run on two machines.

    scripts/report_bench.py run --out results.jsonl --seconds 480 build/lab/cuda/*-BF16     on the GPU: runs the programs
                                                        --ncu: then each variant once under ncu, for what limits it
    scripts/report_bench.py write results.jsonl         anywhere: tables and charts into dev/cuda/results/GPU/, and the summary
                                                        in dev/cuda/README.md between its markers (charts need matplotlib)
    scripts/report_bench.py map                         the list of files and variants in dev/cuda/README.md, from the files

`make -C dev/cuda report` does both. results.jsonl is one file: what a program writes with --json, a line about the machine, a
line about each program. A program that is wrong, hangs or ends early is named in the tables; the others go on.
"""
import argparse
import csv
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "dev" / "cuda"


def fail(message):
    sys.exit(f"error: {message}")


# ---- run -------------------------------------------------------------------------------------

def output_of(*command):
    """the first line that a command prints, or an empty string"""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine():
    """about this machine and this tree, as one object"""
    query = output_of("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    fields = [field.strip() for field in query.split(",")] + [""] * 4
    commit = os.environ.get("COMMIT") or output_of("git", "rev-parse", "--short=10", "HEAD")
    if commit and not os.environ.get("COMMIT") and output_of("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " and uncommitted changes"
    return {"machine": fields[0], "driver": fields[1], "max_clock": fields[2], "power_limit": fields[3],
            "nvcc": re.sub(r".*release ([\d.]+).*", r"\1", output_of("sh", "-c", "nvcc --version | grep release")),
            "date": datetime.date.today().isoformat(), "commit": commit or "unknown"}


def run_one(command, limit, log, quiet=False):
    """runs a program with its output in the log and, unless quiet, on the screen; returns exit code (None: out of time), output
    and seconds"""
    started = time.monotonic()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                   start_new_session=True)
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}")
    text = []
    try:
        out, _ = process.communicate(timeout=limit)
        text.append(out)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
        out, _ = process.communicate()
        text.append((out or "") + f"\nerror: {command[0]}: ended after {limit:.0f} s\n")
        code = None
    text = "".join(text)
    if not quiet:
        print(text, end="", flush=True)
    log.write(f"$ {' '.join(map(str, command))}\n{text}\n")
    log.flush()
    return code, text, time.monotonic() - started


def last_error(text):
    lines = [line for line in text.splitlines() if line.startswith(("error", "WRONG", "Traceback"))]
    return lines[0] if lines else (text.strip().splitlines() or [""])[-1]


# what ncu is asked for, beside the reasons why warps wait
METRICS = {"dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed", "l2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
           "shared": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
           "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
           "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active", "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
           "ns": "gpu__time_duration.sum", "read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
WAITS = re.compile(r"smsp__average_warps?(?:_latency)?_issue_stalled_(\w+?)(?:_per_issue_active)?\.(?:ratio|pct)")


def number(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def kernels_of(text):
    """what `ncu --csv --page raw` printed: {column: text} for each kernel"""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    return list(csv.DictReader(lines[start:]))[1:] if start is not None else []  # the first line holds the units


def what_ncu_says(kernels):
    """of a variant's kernels: sums of time and bytes, and what the longest one was busy with and waited for"""
    longest = max(kernels, key=lambda kernel: number(kernel.get(METRICS["ns"], "")) or 0)
    says = {name: number(longest.get(metric, "")) for name, metric in METRICS.items()}
    for name in ("ns", "read", "written"):
        says[name] = sum(number(kernel.get(METRICS[name], "")) or 0 for kernel in kernels)
    waits = {}
    for column, value in longest.items():
        match = WAITS.fullmatch(column or "")
        if match and "not_issued" not in column and match.group(1) not in ("selected", "not_selected"):
            waits[match.group(1)] = number(value) or 0
    total = sum(waits.values())
    says["waits"] = {reason: round(100 * x / total) for reason, x in sorted(waits.items(), key=lambda w: -w[1])[:3] if total}
    says["kernel"] = re.sub(r"^void |[<(].*", "", longest.get("Kernel Name", ""))
    return {name: round(x, 2) if isinstance(x, float) else x for name, x in says.items() if x is not None}


def profiled(options, programs, out, note, log):
    """each variant of each program once under ncu, on one of its shapes; the programs that take longest last"""
    deadline = time.monotonic() + options.ncu
    _, notes, rows = read_results(out)
    ops = tables_of(rows)
    for program in sorted(programs, key=lambda path: notes.get(tuple(Path(path).name.rsplit("-", 1)), {}).get("seconds", 0)):
        op, _, precision = Path(program).name.rpartition("-")
        left = deadline - time.monotonic()
        keys = chosen_shapes(ops.get(op, {}), precision.lower())
        if not keys or left < 5:
            continue
        shape, rows = keys[-1][1], ops[op][keys[-1]]
        ours = [row for row in rows if timed(row) and row["kind"] != "peer"]
        names = [row["variant"] for row in ours if row["median_us"] < 8000] or [row["variant"] for row in ours]
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", "--print-units", "base",
                   "--section", "WarpStateStats", "--metrics", ",".join(METRICS.values()),
                   program, "--only", ",".join(names), "--shape", shape, "--profile"]
        with open(log.name + ".ncu", "w") as own:  # its output is a table that nobody wants to see
            code, text, _ = run_one(command, min(60.0, left), own, quiet=True)
        variants = []
        for kernel in kernels_of(text):
            if "bench_next_variant" in kernel["Kernel Name"] or not variants:
                variants.append([])
            if "bench_next_variant" not in kernel["Kernel Name"]:
                variants[-1].append(kernel)
        if code != 0 or len(variants) != len(names):
            print(f"{op}: ncu: {len(variants)} of {len(names)} variants, {last_error(text)[:200]}")
        for name, kernels in zip(names, variants):
            if kernels:
                note({"ncu": what_ncu_says(kernels), "op": op, "dtype": precision.lower(), "shape": shape, "variant": name})


def command_run(options):
    out = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    deadline = time.monotonic() + options.seconds
    info, failures = machine(), 0
    with open(out, "w") as results, open(out.with_suffix(".txt"), "w") as log:
        def note(entry):
            results.write(json.dumps(entry) + "\n")
            results.flush()

        def rows_of_part():
            if part.exists():
                text = part.read_text(errors="replace")
                results.write(text if not text or text.endswith("\n") else text + "\n")
                results.flush()
                part.unlink()

        if options.selftest:
            code, text, _ = run_one([options.selftest], 120, log)
            info["selftest"] = (text.strip().splitlines() or ["no output"])[-1] if code == 0 else f"FAILED: {last_error(text)}"
            failures += code != 0
        note(info)
        reserved = options.ncu + (min(150.0, 0.25 * options.seconds) if options.peers else 0)
        programs = [p for p in options.programs if "selftest" not in Path(p).name]
        for i, program in enumerate(programs):
            later = 5.0 * (len(programs) - i - 1)  # most take a few seconds, some can use a minute
            share = max(3.0, min(45.0, deadline - reserved - later - time.monotonic()))
            part.unlink(missing_ok=True)
            op, _, precision = Path(program).name.rpartition("-")
            try:
                listing = subprocess.run([program, "--list"], capture_output=True, text=True, timeout=30)
                is_lab = listing.returncode == 0 and "\nvariants\n" in listing.stdout
            except (OSError, subprocess.TimeoutExpired):
                is_lab = False
            command = [program, "--json", str(part), "--time-limit", f"{share:.0f}"] if is_lab else [program]
            code, text, seconds = run_one(command, 1.5 * share + 60, log)
            rows_of_part()
            entry = {"program": op, "precision": precision, "seconds": round(seconds, 1), "code": code}
            if code != 0:
                entry["error"] = last_error(text)
                failures += 1
            if not is_lab:
                entry["text"] = text[:8000]
            note(entry)
        if options.ncu:
            profiled(options, programs, out, note, log)
        if options.peers:
            left = max(20.0, deadline - time.monotonic())
            command = [sys.executable, options.peers, "--results", str(out), "--json", str(part), "--time-limit", f"{left:.0f}"]
            code, text, seconds = run_one(command, left + 60, log)
            rows_of_part()
            entry = {"program": "peers", "seconds": round(seconds, 1), "code": code}
            if code != 0:
                entry["error"] = last_error(text)
            note(entry)
    print(f"{out}: {sum(1 for _ in open(out))} lines; {failures} programs with errors")
    return min(failures, 100)


# ---- write: what is read ---------------------------------------------------------------------

def read_results(path):
    """machine, programs by (name, precision), rows; the last row counts where one is given twice. A row's "ncu": what ncu said"""
    info, programs, rows, said = {}, {}, {}, {}
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        fail(f"{path}: {error.strerror}; make -C dev/cuda results writes one on a machine with a GPU")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            print(f"warning: {path}:{number}: no JSON object, passed over: {line[:60]}", file=sys.stderr)
            continue
        if "machine" in entry:
            info = entry
        elif "program" in entry:
            programs[entry["program"], entry.get("precision", "")] = entry
        elif "ncu" in entry:
            said[entry["op"], entry["dtype"], entry["shape"], entry["variant"]] = entry["ncu"]
        elif all(key in entry for key in ("op", "shape", "variant", "dtype", "check")):
            rows[entry["op"], entry["dtype"], entry["shape"], entry["variant"]] = entry
        else:
            print(f"warning: {path}:{number}: neither a row nor a note, passed over", file=sys.stderr)
    if not rows:
        fail(f"{path}: no rows in it; expected what a program of the lab writes with --json")
    for key in said.keys() & rows.keys():
        rows[key]["ncu"] = said[key]
    return info, programs, list(rows.values())


def tables_of(rows):
    """{op: {(dtype, shape): rows}}, in the order of the file; peers last"""
    ops = {}
    for row in rows:
        ops.setdefault(row["op"], {}).setdefault((row["dtype"], row["shape"]), []).append(row)
    for shapes in ops.values():
        for key in shapes:
            shapes[key].sort(key=lambda row: row.get("kind") == "peer")
    return ops


def rate(row):
    """the figure, and its unit"""
    return (row["TFLOPs"], "TFLOP/s") if "TFLOPs" in row else (row.get("GBps"), "GB/s")


def rate_text(row):
    value, unit = rate(row)
    return "" if value is None else f"{value:.1f}" if unit == "TFLOP/s" else f"{value:.0f}"


def us_text(us):
    return f"{us:.2f}" if us < 100 else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def sizes_text(row):
    return " ".join(f"{name} {value}" for name, value in row.get("sizes", {}).items())


def timed(row):
    return "median_us" in row and row["check"] == "ok"


def cell(text):
    return str(text).replace("|", "\\|")


# ---- write: a page and a chart an op ----------------------------------------------------------

def head_of(rows):
    """what is above a table: sizes, work, peak"""
    row = next((row for row in rows if row.get("kind") != "peer"), rows[0])
    work = row.get("work", 0)
    text = sizes_text(row)
    if any("TFLOPs" in r for r in rows):
        text += f"; {work * 1e-12:.4g} TFLOP"
    elif work:
        text += f"; must move {work * 1e-6:.1f} MB"
    copies = [r["copy_GBps"] for r in rows if "copy_GBps" in r]
    return text + (f"; a copy of as many bytes runs at {copies[0]:.0f} GB/s" if copies else "")


def table_text(rows):
    unit = next((rate(row)[1] for row in rows if timed(row)), "GB/s")
    itself = [row for row in rows if row.get("times_production") == 1]  # and what is exactly as fast
    beside = next((row["variant"] for kind in ("production", "yardstick", "variant") for row in itself if row["kind"] == kind), "production")
    text = f"| variant | check | block | median µs | spread | {unit} | % of peak | × {beside} | what changed |\n"
    text += "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n"
    for row in rows:
        peer, kind = row.get("kind") == "peer", row.get("kind")
        name = f"*{row['variant']}*" if peer else f"**{row['variant']}**" if kind == "production" else row["variant"]
        check = "" if peer and row["check"] == "ok" else row["check"]
        if timed(row):
            spread = "once" if row.get("once") else f"{row['spread_percent']:.1f} %"
            percent = f"{row['percent_of_peak']:.1f}" if "percent_of_peak" in row else ""
            times = f"{row['times_production']:.2f}" if "times_production" in row else ""
            cells = [name, check, row.get("block") or "-", us_text(row["median_us"]), spread, rate_text(row), percent, times]
        else:
            cells = [name, check, "", "", "", "", "", ""]
        text += "| " + " | ".join(cell(c) for c in cells + [row.get("what", "")]) + " |\n"
    return text


def ncu_text(rows):
    """what ncu said of the variants, or nothing"""
    rows = [row for row in rows if "ncu" in row]
    if not rows:
        return ""
    text = "\nUnder ncu, one launch: memory, L2, shared memory and tensor cores as % of what they can do, issue slots in use, warps " \
           "as % of what fits, and what the warps of the longest kernel wait for\n\n"
    text += "| variant | kernel µs | GB read | GB written | memory | L2 | shared | tensor | issue | warps | waits for |\n"
    text += "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n"
    for row in rows:
        says = row["ncu"]
        cells = [row["variant"], us_text(says["ns"] * 1e-3), f"{says['read'] * 1e-9:.2f}", f"{says['written'] * 1e-9:.2f}"]
        cells += [f"{says[name]:.0f}" if name in says else "" for name in ("dram", "l2", "shared", "tensor", "issue", "warps")]
        cells.append(", ".join(f"{reason} {share} %" for reason, share in says["waits"].items()))
        text += "| " + " | ".join(cell(c) for c in cells) + " |\n"
    return text


def origin_of(info, rows):
    gpu = info.get("machine") or rows[0].get("gpu", "an unknown GPU")
    parts = [gpu] + [f"{name} {info[key]}" for key, name in (("driver", "driver"), ("nvcc", "nvcc"), ("commit", "commit"))
                     if info.get(key)]
    return ", ".join(parts + [info["date"]] if info.get("date") else parts)


def chart(op, tables, origin, path):
    """one panel a shape (those of the summary, in one type): bars of the rate, the peak as a line"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"})
    colours = {"production": "#1b6ca8", "yardstick": "#3a9d6a", "variant": "#9dbcd4", "peer": "#e0954a"}
    shapes = chosen_shapes(tables, "bf16") or chosen_shapes(tables, "fp32")
    panels = [(key, [row for row in tables[key] if timed(row)]) for key in shapes]
    if not panels:
        return False
    heights = [0.26 * len(rows) + 0.75 for _, rows in panels]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, sum(heights) + 0.5), layout="constrained", squeeze=False,
                                gridspec_kw={"height_ratios": heights})
    for ((dtype, shape), rows), axis in zip(panels, axes[:, 0]):
        values = [rate(row)[0] for row in rows]
        unit = rate(rows[0])[1]
        peak = next((row["copy_GBps"] for row in rows if "copy_GBps" in row), None)
        most = max(values + ([peak] if peak else []))
        axis.barh(range(len(rows)), values, height=0.72, color=[colours.get(row.get("kind"), colours["variant"]) for row in rows])
        for i, row in enumerate(rows):
            axis.text(values[i] + 0.008 * most, i, f"{rate_text(row)} {unit}, {us_text(row['median_us'])} µs", va="center",
                      fontsize=8, color="#333333", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        if peak:
            axis.axvline(peak, color="#666666", linewidth=1, linestyle="--", zorder=0.5)
            axis.text(peak, -0.62, "copy ", ha="right", va="bottom", fontsize=8, color="#666666")
        axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.7)
        axis.set_xlim(0, 1.25 * most)
        axis.set_title(f"{dtype}, {shape}: {sizes_text(rows[0])}", loc="left", fontsize=10)
    figure.suptitle(f"{op}   {origin}", fontsize=9, color="#444444", x=0.01, ha="left")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    try:  # a sixth of the size
        from PIL import Image
        Image.open(path).convert("RGB").quantize(48).save(path, optimize=True)
    except ImportError:
        pass
    return True


# ---- write: the summary ----------------------------------------------------------------------

def chosen_shapes(tables, dtype):
    """the shapes of an op that the summary shows: those of the 1B and the 8B model, else the first two"""
    keys = [key for key in tables if key[0] == dtype and any(timed(row) for row in tables[key])]
    models = [next((key for key in keys if re.match(rf"{model}\b", key[1])), None) for model in ("1B", "8B")]
    return [key for key in models if key] or keys[:2]


def summary_row(op, key, rows, folder):
    ours = [row for row in rows if row.get("kind") != "peer" and timed(row)]
    peers = [row for row in rows if row.get("kind") == "peer" and timed(row)]
    reference = next((row for row in ours if row["kind"] == "production"), None) or \
        next((row for row in ours if row["kind"] == "yardstick"), None) or min(ours, key=lambda row: row["median_us"])
    first = ours[0]
    best = min((row for row in ours if row is reference or row["kind"] == "variant"), key=lambda row: row["median_us"])
    value, unit = rate(reference)
    us = reference["median_us"]
    peer = min(peers, key=lambda row: row["median_us"]) if peers else None
    cells = [f"[{op}]({folder}/{op}.md)", f"{key[1]}", us_text(us), f"{rate_text(reference)} {unit}",
             f"{reference['percent_of_peak']:.1f}" if "percent_of_peak" in reference else "",
             f"{first['median_us'] / us:.1f} × {first['variant']}" if first is not reference else "",
             f"{best['variant']} {us / best['median_us']:.2f} ×" if best["median_us"] < 0.99 * us else "",
             f"{peer['variant']} {us_text(peer['median_us'])} µs, {peer['median_us'] / us:.2f} ×" if peer else ""]
    return "| " + " | ".join(cell(c) for c in cells) + " |\n"


def summary_text(ops, programs, info, origin, folder):
    text = f"Measured on {origin}."
    if info.get("selftest"):
        text += f" The harness's self-test in the same run: {info['selftest'].split('   ')[-1]}."
    text += "\n"
    for dtype in ("bf16", "fp32"):
        lines = [summary_row(op, key, tables[key], folder) for op, tables in ops.items() for key in chosen_shapes(tables, dtype)
                 if any(row.get("kind") != "peer" and timed(row) for row in tables[key])]
        if lines:
            text += f"\n{dtype}: the row that ships (\"production\"; in files without one, the yardstick)\n\n"
            text += "| op | shape | µs | rate | % of peak | faster than the first row | faster in the lab " \
                    "| best of PyTorch, Liger: time, × ours |\n"
            text += "| --- | --- | ---: | ---: | ---: | --- | --- | --- |\n" + "".join(lines)
    wrong = [f"{op}, {dtype}, {shape}: `{row['variant']}` {row['check']}" for op, tables in ops.items()
             for (dtype, shape), rows in tables.items() for row in rows if row["check"].startswith("WRONG")]
    how = lambda p: "out of time" if p["code"] is None else f"exit code {p['code']}"
    ended = [f"{name} {precision}: {how(p)}, {p.get('error', '')}"
             for (name, precision), p in programs.items() if p.get("code") != 0]
    for title, items in (("Wrong, and not timed", wrong), ("Programs that did not end well", ended)):
        if items:
            text += f"\n{title}:\n\n" + "".join(f"- {item}\n" for item in items)
    return text


def replace_between(path, marker, text):
    """the text between <!-- marker:begin … --> and <!-- marker:end -->"""
    try:
        old = path.read_text()
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    found = re.search(rf"(<!-- {marker}:begin[^>]*-->\n).*?(<!-- {marker}:end -->)", old, re.S)
    if not found:
        fail(f"{path}: expected the markers <!-- {marker}:begin --> and <!-- {marker}:end -->")
    path.write_text(old[:found.start()] + found.group(1) + text + found.group(2) + old[found.end():])


def command_write(options):
    info, programs, rows = read_results(options.results)
    ops = tables_of(rows)
    origin = origin_of(info, rows)
    gpu = info.get("machine") or rows[0].get("gpu", "unknown")
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder = options.out or LAB / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import matplotlib  # noqa: F401
        charts = not options.no_charts
    except ImportError:
        charts = False
        print("no matplotlib here: tables without charts (pip install matplotlib, then run this again)", file=sys.stderr)
    short_origin = ", ".join(filter(None, (gpu, info.get("date"), info.get("commit"))))
    for op, tables in ops.items():
        drawn = charts and chart(op, tables, short_origin, folder / f"{op}.png")
        text = f"# {op}\n\nThe variants are in [dev/cuda/{op}.cu](../../{op}.cu). {origin}.\n"
        if drawn or (folder / f"{op}.png").exists():
            text += f"\n![{op}]({op}.png)\n"
        for (dtype, shape), table in tables.items():
            text += f"\n## {dtype}, {shape}\n\n{head_of(table)}\n\n{table_text(table)}{ncu_text(table)}"
        (folder / f"{op}.md").write_text(text)
    for (name, _), program in programs.items():
        if program.get("text") and program["code"] == 0:  # no table of rows: what it printed
            (folder / f"{name}.md").write_text(f"# {name}\n\n{origin}.\n\n```\n{program['text'].strip()}\n```\n")
    copy = folder / "results.jsonl"
    if copy.resolve() != Path(options.results).resolve():
        copy.write_text(Path(options.results).read_text(errors="replace"))
    if not options.out:
        replace_between(LAB / "README.md", "results", summary_text(ops, programs, info, origin, f"results/{slug}"))
        write_map()
    print(f"{folder}: {len(ops)} ops, {len(rows)} rows" + (", README.md rewritten" if not options.out else ""))
    return 0


# ---- map -------------------------------------------------------------------------------------

def describe(path):
    """(what the file computes, [(variant, idea)]) of a lab file"""
    text = path.read_text()
    rows = text
    for included in re.findall(r'^#include "(\w+\.cu)"', text, re.M):  # one op on another's page
        rows += (path.parent / included).read_text()
    comment = re.match(r"/\*\n(.*?)\*/", text, re.S)
    first = comment.group(1).strip().split("\n\n")[0] if comment else ""
    first = " ".join(first.split())
    sentence = re.match(r"(.+?[.:])(\s|$)", first)
    names = []
    for table in re.findall(r"Variant<\w+>\s+\w+\[\]\s*=\s*\{(.*?)\n\};", rows, re.S):
        for name in re.findall(r"^\s*\{\s*\"([^\"]+)\"\s*,", table, re.M):
            if name not in names:
                names.append(name)
    return (sentence.group(1).rstrip(":.") if sentence else first), names


def write_map():
    text = "| file | what | its variants, in the order of the ideas |\n| --- | --- | --- |\n"
    for path in sorted(LAB.glob("*.cu")):
        what, names = describe(path)
        if path.stem == "selftest":
            names = []
        text += f"| [{path.stem}.cu]({path.name}) | {cell(what)} | {', '.join(f'`{name}`' for name in names)} |\n"
    replace_between(LAB / "README.md", "map", text)


def command_map(options):
    write_map()
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|write|map")
    run = commands.add_parser("run", help="run the programs of the lab on this GPU")
    run.add_argument("programs", nargs="+", help="as built by make -C dev/cuda")
    run.add_argument("--out", type=Path, default=Path("results.jsonl"), help="beside it, .txt: what was printed")
    run.add_argument("--seconds", type=float, default=480, help="for all of it, about (480)")
    run.add_argument("--selftest", help="the self-test, run first")
    run.add_argument("--ncu", type=float, default=0, metavar="SECONDS", help="about so long, each variant once under ncu (0: not)")
    run.add_argument("--peers", help="peers.py, run last")
    run.set_defaults(run=command_run)
    write = commands.add_parser("write", help="tables and charts from results.jsonl")
    write.add_argument("results", type=Path)
    write.add_argument("--out", type=Path, help="this folder instead of dev/cuda/results/GPU, and no README.md")
    write.add_argument("--no-charts", action="store_true")
    write.set_defaults(run=command_write)
    commands.add_parser("map", help="the list of files and variants in dev/cuda/README.md").set_defaults(run=command_map)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())

// Draws the charts of a page and makes its tables sortable. Everything that
// came from a trace reaches the document as text, never as markup.
"use strict";
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (i) => css("--c" + Math.min(i, 7));
  const element = (tag, text, attributes) => {
    const e = document.createElement(tag);
    if (text) e.textContent = text;
    for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
    return e;
  };

  // ---- units

  const digits = (v, n) => String(Number(v.toPrecision(n)));
  const formats = {
    bytes(v) {
      const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
      let i = 0;
      for (; Math.abs(v) >= 1024 && i < units.length - 1; i++) v /= 1024;
      return digits(v, i ? 4 : 15) + " " + units[i];
    },
    us(v) {
      if (v === 0) return "0 s";
      const a = Math.abs(v);
      if (a < 1e3) return digits(v, 4) + " µs";
      if (a < 1e6) return digits(v / 1e3, 4) + " ms";
      if (a < 6e7) return digits(v / 1e6, 4) + " s";
      return digits(v / 6e7, 4) + " min";
    },
    count: (v) => Number(v.toPrecision(6)).toLocaleString("en"),
    none: () => "",
  };
  // The distances between the ticks of an axis, in its unit.
  const decades = [...Array(20).keys()].flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e));
  const steps = {
    bytes: [...Array(60).keys()].map((e) => 2 ** e),
    us: decades,
    count: decades,
    none: decades,
  };

  const axis = (a, size) => ({
    stroke: css("--fg"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
    grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 },
    label: a.name, labelSize: 22, size, incrs: steps[a.unit], space: size === 34 ? 90 : 26,
    values: (u, splits) => ticks(a.unit, splits),
  });

  // ticks writes all ticks of a time axis in one unit, with as many digits as tell them apart.
  const ticks = (unit, splits) => {
    if (unit !== "us" || splits.length < 2) return splits.map((v) => v == null ? "" : formats[unit](v));
    const largest = Math.max(...splits.map(Math.abs)), step = splits[1] - splits[0];
    const [per, name] = largest >= 1e6 ? [1e6, "s"] : largest >= 1e3 ? [1e3, "ms"] : [1, "µs"];
    const places = Math.max(0, -Math.floor(Math.log10(step / per) + 1e-9));
    return splits.map((v) => (v / per).toFixed(Math.min(places, 9)) + " " + name);
  };

  // ---- what charts have in common

  const groups = {}; // charts that share their horizontal axis
  const axisSize = 78;

  const base = (chart, x, y) => ({
    width: chart.width(), height: chart.height, legend: { show: false }, padding: [24, 12, 0, 0],
    scales: { x: { time: false, range: (u, min, max) => [min, max > min ? max : min + 1] }, y: { auto: false, range: () => y.range } },
    axes: [axis(x, 34), axis(y, axisSize)],
    cursor: {
      drag: { x: true, y: false, uni: 20 }, points: { show: false }, y: false,
      sync: { key: chart.group, scales: ["x", null], filters: { pub: (t) => t === "mousemove" || t === "mouseleave" } },
      bind: { dblclick: () => () => zoomOut(chart.group) },
    },
    hooks: { setScale: [(u, key) => key === "x" && follow(chart, u)], draw: [] },
  });

  // follow gives the other charts of a group the part that one of them shows.
  let following = false;
  const follow = (chart, u) => {
    if (following) return;
    following = true;
    for (const other of groups[chart.group]) {
      if (other !== chart && other.plot) {
        other.plot.setScale("x", { min: u.scales.x.min, max: u.scales.x.max });
        other.plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }
    }
    following = false;
  };
  const zoomOut = (group) => {
    for (const c of groups[group]) {
      c.plot.setScale("x", { min: c.data.x.min, max: c.data.x.max });
      if (c.zoomOut) c.zoomOut();
    }
  };

  // marks draws the moments that have a name, the readiness for instance.
  const marks = (u, list) => {
    const c = u.ctx, r = devicePixelRatio;
    c.save();
    c.font = 12 * r + "px system-ui, sans-serif";
    for (const m of list || []) {
      const x = Math.round(u.valToPos(m.at, "x", true));
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      c.fillStyle = css("--mark");
      for (const [style, width, dash] of [[css("--bg"), 4, []], [css("--mark"), 2, [5, 3]]]) {
        c.strokeStyle = style;
        c.lineWidth = width * r;
        c.setLineDash(dash.map((v) => v * r));
        c.beginPath();
        c.moveTo(x, u.bbox.top - 6 * r);
        c.lineTo(x, u.bbox.top + u.bbox.height);
        c.stroke();
      }
      const half = c.measureText(m.name).width / 2;
      c.textAlign = "center";
      c.textBaseline = "bottom";
      c.fillText(m.name, Math.max(half + 2, Math.min(x, u.ctx.canvas.width - half - 2)), u.bbox.top - 7 * r);
    }
    c.restore();
  };

  // legend shows names with their colours; a click hides what has the name.
  const legend = (chart, names, hidden, redraw) => {
    chart.legend.replaceChildren(...names.map((name, i) => {
      const b = element("button", "", { type: "button", "aria-pressed": String(!hidden.has(i)) });
      const chip = element("i");
      chip.style.background = colour(i);
      b.append(chip, name);
      b.addEventListener("click", () => {
        if (!hidden.delete(i)) hidden.add(i);
        b.setAttribute("aria-pressed", String(!hidden.has(i)));
        redraw();
      });
      return b;
    }));
  };

  // tip is a box of text beside the pointer.
  const tip = (u) => {
    const box = element("div", "", { class: "tip", hidden: "" });
    u.over.append(box);
    return (text) => {
      box.hidden = !text;
      if (!text) return;
      box.textContent = text;
      const { left, top } = u.cursor, w = u.over.clientWidth, h = u.over.clientHeight;
      box.style.left = Math.max(0, left > w / 2 ? left - box.offsetWidth - 12 : left + 12) + "px";
      box.style.top = Math.max(0, Math.min(top + 12, h - box.offsetHeight)) + "px";
    };
  };

  const kinds = {};

  // ---- areas: lines over time, each on top of the one before if data.stacked

  kinds.areas = (chart) => {
    const d = chart.data, hidden = chart.hidden ||= new Set();
    const shown = d.lines.map((l, i) => i).filter((i) => !hidden.has(i));
    const sums = [];
    let below = d.at.map(() => 0);
    for (const i of shown) {
      const v = d.lines[i].values;
      sums.push(below = d.stacked ? below.map((b, k) => b + v[k]) : v);
    }
    const top = Math.max(...sums.flat(), 0) * 1.05 || 1;
    const opts = base(chart, d.x, { ...d.y, range: [0, top] });
    const paths = d.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined;
    opts.series = [{}, ...shown.map((i) => ({
      label: d.lines[i].name, stroke: colour(i), fill: d.stacked ? colour(i) : shown.length === 1 ? colour(i) + "66" : undefined, width: 1, paths, points: { show: false },
    })).reverse()];
    opts.hooks.draw.push((u) => marks(u, d.marks));
    opts.hooks.setCursor = [(u) => {
      const i = u.cursor.idx;
      if (!u.cursor.event || i == null || u.cursor.left < 0) return chart.tip("");
      chart.tip([formats[d.x.unit](d.at[i]), ...shown.map((k) => d.lines[k].name + ": " + formats[d.y.unit](d.lines[k].values[i])).reverse()].join("\n"));
    }];
    chart.plot = new uPlot(opts, [d.at, ...sums.reverse()], chart.figure);
    chart.tip = tip(chart.plot);
    if (d.lines.length > 1) legend(chart, d.lines.map((l) => l.name), hidden, () => rebuild(chart));
  };

  // ---- reads: where on the device, and when

  // compact returns where each mark lies if only what is marked has a place, and how large all of it is.
  const compact = (d) => {
    const order = d.y0.map((_, i) => i).sort((a, b) => d.y0[a] - d.y0[b]);
    const at = new Array(order.length);
    const bands = d.bands.map((b) => ({ name: b.name, at: 0, size: 0 }));
    let end = -1, place = 0, band = 0;
    for (const i of order) {
      const lo = Math.max(d.y0[i], end);
      while (band < d.bands.length - 1 && d.y0[i] >= d.bands[band + 1].at) bands[++band].at = place;
      at[i] = place - Math.max(end - d.y0[i], 0);
      const more = Math.max(d.y0[i] + d.h[i] - lo, 0);
      place += more;
      bands[band].size += more;
      end = Math.max(end, d.y0[i] + d.h[i]);
    }
    while (band < d.bands.length - 1) bands[++band].at = place;
    return { at, bands, total: place };
  };

  kinds.reads = (chart) => {
    const d = chart.data;
    const s = chart.state ||= { by: 0, compact: false, hidden: new Set(), find: "" };
    const place = s.compact ? (chart.compact ||= compact(d)) : { at: d.y0, bands: d.bands, total: d.height };
    const dim = d.dims[s.by];
    const found = s.find ? d.paths.map((p) => p.includes(s.find)) : null;
    const colours = dim.names.map((_, i) => colour(i));
    const faint = css("--line");

    const opts = base(chart, d.x, { name: d.y.name, unit: "bytes", range: [0, place.total] });
    opts.scales.y = { range: (u, min, max) => min == null ? [0, place.total] : [min, max] };
    opts.cursor.drag.y = opts.cursor.y = true;
    opts.series = [{}, { paths: () => null, points: { show: false } }];
    opts.axes[1].splits = d.bands.length > 1 ? (u) => bandTicks(u, place.bands) : undefined;
    opts.axes[1].values = d.bands.length > 1
      ? (u, splits) => splits.map((v) => (place.bands.find((b) => b.size && b.at + b.size / 2 === v) || {}).name || "")
      : opts.axes[1].values;
    if (d.bands.length > 1) opts.axes[1].grid = opts.axes[1].ticks = { show: false };

    opts.hooks.drawClear = [(u) => stripes(u, place.bands)];
    opts.hooks.draw.push((u) => {
      const c = u.ctx, r = devicePixelRatio;
      c.save();
      c.beginPath();
      c.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      c.clip();
      let drawn = 0;
      for (let i = 0; i < d.t.length; i++) {
        const group = dim.of[i];
        if (s.hidden.has(group)) continue;
        const x = u.valToPos(d.t[i], "x", true), x1 = u.valToPos(d.t[i] + d.w[i], "x", true);
        const y = u.valToPos(place.at[i], "y", true), y1 = u.valToPos(place.at[i] + d.h[i], "y", true);
        c.fillStyle = found && !found[d.p[i]] ? faint : colours[group];
        c.fillRect(x, Math.min(y1, y - 2.5 * r), Math.max(x1 - x, 2.5 * r), Math.max(y - y1, 2.5 * r));
        drawn++;
      }
      c.restore();
      chart.figure.dataset.drawn = drawn;
      marks(u, d.marks);
    });
    opts.hooks.setCursor = [(u) => chart.tip(u.cursor.event && u.cursor.left >= 0 ? describe(nearest(u)) : "")];

    const nearest = (u) => {
      let best = -1, least = 12 * 12; // pixels
      for (let i = 0; i < d.t.length; i++) {
        if (s.hidden.has(dim.of[i])) continue;
        const x = u.valToPos(d.t[i], "x"), x1 = u.valToPos(d.t[i] + d.w[i], "x");
        const y = u.valToPos(place.at[i], "y"), y1 = u.valToPos(place.at[i] + d.h[i], "y");
        const dx = Math.max(x - u.cursor.left, u.cursor.left - Math.max(x1, x + 2), 0);
        const dy = Math.max(y1 - u.cursor.top, u.cursor.top - y, 0);
        if (dx * dx + dy * dy <= least) [best, least] = [i, dx * dx + dy * dy];
      }
      return best;
    };
    const describe = (i) => {
      if (i < 0) return "";
      const lines = [d.n[i] > 1 ? formats.count(d.n[i]) + " reads, " + formats.bytes(d.b[i]) : formats.bytes(d.b[i])];
      lines[0] += d.x.unit === "us" ? " at " + formats.us(d.t[i]) + (d.w[i] ? ", waited " + formats.us(d.w[i]) : "") : ", read number " + formats.count(d.t[i]);
      if (d.paths.length) lines.push(d.paths[d.p[i]]);
      for (const one of d.dims) if (one.names.length > 1) lines.push(one.name + ": " + one.names[one.of[i]]);
      return lines.join("\n");
    };

    chart.plot = new uPlot(opts, [[d.x.min, d.x.max], [0, place.total]], chart.figure);
    chart.tip = tip(chart.plot);
    chart.zoomOut = () => chart.plot.setScale("y", { min: 0, max: place.total });
    legend(chart, dim.names, s.hidden, () => chart.plot.redraw());
    if (!chart.controls.firstChild) readsControls(chart, s);
  };

  const readsControls = (chart, s) => {
    const d = chart.data;
    const choose = (name, options, at, set) => {
      const label = element("label", name + " "), select = element("select");
      options.forEach((o) => select.append(element("option", o)));
      select.selectedIndex = at;
      select.addEventListener("change", () => { set(select.selectedIndex); rebuild(chart); });
      label.append(select);
      return label;
    };
    if (d.dims.length > 1) {
      chart.controls.append(choose("Colours show the", d.dims.map((x) => x.name), s.by, (i) => { s.by = i; s.hidden.clear(); }));
    }
    chart.controls.append(choose("Height shows", ["all of each layer, to scale", "only what was read"], 0, (i) => s.compact = i === 1));
    if (d.paths.length) {
      const label = element("label", "Only files whose path has "), input = element("input", "", { type: "search", spellcheck: "false" });
      input.addEventListener("input", () => { s.find = input.value; rebuild(chart); });
      label.append(input);
      chart.controls.append(label);
    }
    const reset = element("button", "Show everything again", { type: "button" });
    reset.addEventListener("click", () => zoomOut(chart.group));
    chart.controls.append(reset);
  };

  // bandTicks puts a label at the middle of each band that has the room.
  const bandTicks = (u, bands) => {
    const out = [], height = u.bbox.height / devicePixelRatio, { min, max } = u.scales.y;
    let free = -Infinity;
    for (const b of bands) {
      if (!b.size) continue;
      const mid = b.at + b.size / 2, at = (mid - min) / (max - min) * height;
      if (at < 0 || at > height || at - free < 16) continue;
      out.push(mid);
      free = at;
    }
    return out;
  };

  // stripes shades every other band.
  const stripes = (u, bands) => {
    const c = u.ctx, { left, top, width, height } = u.bbox;
    c.save();
    c.beginPath();
    c.rect(left, top, width, height);
    c.clip();
    c.fillStyle = css("--panel");
    bands.forEach((b, i) => {
      if (bands.length > 1 && i % 2) return;
      const y0 = u.valToPos(b.at, "y", true), y1 = u.valToPos(b.at + b.size, "y", true);
      c.fillRect(left, y1, width, y0 - y1);
    });
    c.restore();
  };

  // ---- building

  const rebuild = (chart) => {
    const old = chart.plot, shown = old && { min: old.scales.x.min, max: old.scales.x.max };
    if (old) old.destroy();
    kinds[chart.kind](chart);
    if (shown && shown.min != null) chart.plot.setScale("x", shown);
  };

  const charts = [...document.querySelectorAll("section.chart")].map((section) => {
    const figure = section.querySelector(".plot");
    const chart = {
      kind: section.dataset.kind, group: section.dataset.group || section.id, figure,
      controls: section.querySelector(".controls"), legend: section.querySelector(".legend"),
      data: JSON.parse(section.querySelector('script[type="application/json"]').textContent),
      width: () => Math.max(figure.clientWidth, 200),
    };
    chart.height = chart.data.tall ? Math.max(320, Math.min(innerHeight * 0.6, 560)) : 260;
    (groups[chart.group] ||= []).push(chart);
    return chart;
  });
  for (const chart of charts) {
    rebuild(chart);
    new ResizeObserver(() => {
      if (chart.plot.width !== chart.width()) chart.plot.setSize({ width: chart.width(), height: chart.height });
    }).observe(chart.figure);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(rebuild));

  // ---- tables

  const few = 15;
  for (const section of document.querySelectorAll("section.table")) {
    const body = section.querySelector("tbody");
    if (!body) continue;
    const rows = [...body.rows].map((tr) => ({ tr, text: tr.textContent.toLowerCase() }));
    const controls = section.querySelector(".controls"), status = element("span", "", { "aria-live": "polite" });
    let all = rows.length <= few + 5, wanted = "";
    const more = element("button", "Show all " + rows.length, { type: "button" });

    const show = () => {
      let fit = 0;
      for (const r of rows) {
        const hit = r.text.includes(wanted);
        if (hit) fit++;
        r.tr.hidden = !hit || (!all && fit > few);
      }
      more.hidden = all || fit <= few;
      status.textContent = wanted ? fit + " of " + rows.length + " fit" : "";
    };
    more.addEventListener("click", () => { all = true; show(); });

    if (rows.length > 5) {
      const label = element("label", "Filter "), input = element("input", "", { type: "search", spellcheck: "false" });
      input.addEventListener("input", () => { wanted = input.value.toLowerCase(); show(); });
      label.append(input);
      controls.append(label, status);
    }
    body.parentElement.parentElement.after(more);

    section.querySelectorAll("th").forEach((th, col) => {
      const button = element("button", th.textContent, { type: "button" });
      if (th.title) button.title = th.title;
      th.replaceChildren(button);
      const text = th.classList.contains("text");
      const key = (r) => { const td = r.tr.cells[col]; return text ? td.textContent : Number(td.dataset.v); };
      button.addEventListener("click", () => {
        const down = th.getAttribute("aria-sort") ? th.getAttribute("aria-sort") === "ascending" : !text;
        section.querySelectorAll("th").forEach((o) => o.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", down ? "descending" : "ascending");
        const sign = down ? -1 : 1;
        rows.sort((a, b) => { const x = key(a), y = key(b); return x < y ? -sign : x > y ? sign : 0; });
        body.append(...rows.map((r) => r.tr));
        show();
      });
    });
    section.querySelectorAll("th.share").forEach((th) => {
      const col = th.cellIndex;
      const most = Math.max(...rows.map((r) => Number(r.tr.cells[col].dataset.v)), 0) || 1;
      for (const r of rows) {
        const td = r.tr.cells[col];
        td.style.backgroundSize = 100 * Number(td.dataset.v) / most + "% 100%";
      }
    });
    show();
  }
  document.documentElement.dataset.drawn = charts.length;
})();

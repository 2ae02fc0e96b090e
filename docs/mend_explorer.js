"use strict";
// Draws mend_data.js (window.MEND): classes, y, margins and clean margins in half precision, choices.

function halves(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const words = new Uint16Array(bytes.buffer);
  return Float32Array.from(words, (h) => {
    const sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, f = h & 1023;
    if (e === 31) return f ? NaN : sign * Infinity;
    return sign * (e ? 2 ** (e - 15) * (1 + f / 1024) : 2 ** -14 * (f / 1024));
  });
}

function risks(margins, y, b) {
  const C = b.length, lost = new Array(C).fill(0), n = new Array(C).fill(0);
  for (let i = 0; i < y.length; i++) {
    const own = y[i];
    let least = Infinity;
    for (let k = 0; k < C; k++) least = Math.min(least, margins[i * C + k] + b[own] - b[k]);
    n[own] += 1;
    lost[own] += least <= 0;
  }
  return lost.map((v, c) => v / n[c]);
}

const { classes, y, choices } = window.MEND, zero = classes.map(() => 0);
const matrices = { attacked: halves(window.MEND.margins), clean: halves(window.MEND.clean) };
const at = (id) => document.getElementById(id);
const most = 1.5 * Math.max(...Object.values(choices).flat().map(Math.abs));

const sliders = classes.map((name) => {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "range", min: -most, max: most, step: most / 200, value: 0 });
  input.setAttribute("aria-label", `offset of ${name}`);
  input.addEventListener("input", draw);
  label.append(name, input, document.createElement("output"));
  at("sliders").append(label);
  return input;
});

const mean = (r) => r.reduce((a, v) => a + v) / r.length;

// The choices in the plane of average and worst class, and where the sliders are.
function place(m, now) {
  const spot = (r) => [mean(r), Math.max(...r)], names = Object.keys(choices);
  const all = [...names.map((k) => spot(risks(m, y, choices[k]))), spot(now)];
  const low = [0, 1].map((i) => Math.min(...all.map((p) => p[i])) - 0.02);
  const high = [0, 1].map((i) => Math.max(...all.map((p) => p[i])) + 0.02);
  const xy = (p) => [660 + (170 * (p[0] - low[0])) / (high[0] - low[0]), 210 - (190 * (p[1] - low[1])) / (high[1] - low[1])];
  const dot = (p, r, fill, more) => `<circle cx="${xy(p)[0]}" cy="${xy(p)[1]}" r="${r}" fill="${fill}" ${more}</circle>`;
  return names.map((k, i) => dot(all[i], 4, "#55a868", `><title>${k}</title>`)).join("") +
    dot(all[names.length], 6, "none", 'id="here" stroke="#c44e52" stroke-width="2.5">') +
    '<text x="745" y="228" text-anchor="middle" font-size="12" fill="currentColor">right: average, up: worst class</text>';
}

for (const name of Object.keys(choices)) at("choice").append(new Option(name));
at("choice").addEventListener("change", choose);
at("clean").addEventListener("change", draw);

function choose() {
  choices[at("choice").value].forEach((b, c) => (sliders[c].value = b));
  draw();
}

function draw() {
  const b = sliders.map((s) => Number(s.value));
  const m = matrices[at("clean").checked ? "clean" : "attacked"];
  const before = risks(m, y, zero), now = risks(m, y, b), worst = Math.max(...now);
  const step = 620 / classes.length, parts = [];
  for (let c = 0; c < classes.length; c++) {
    const x = 10 + c * step, bar = (v, left, fill) =>
      `<rect x="${x + left * step}" y="${10 + 200 * (1 - v)}" width="${0.4 * step}" height="${200 * v}" fill="${fill}"/>`;
    parts.push(bar(before[c], 0, "#bbb"), bar(now[c], 0.42, now[c] === worst ? "#c44e52" : "#55a868"));
    parts.push(`<text x="${x + 0.41 * step}" y="228" text-anchor="middle" font-size="12" fill="currentColor">${classes[c]}</text>`);
    sliders[c].nextElementSibling.value = b[c].toFixed(2);
  }
  parts.push(place(m, now));
  at("bars").innerHTML = parts.join("");
  const say = (v) => (100 * v).toFixed(1);
  at("said").textContent =
    `worst class ${say(worst)} % (as trained ${say(Math.max(...before))} %), ` +
    `average ${say(mean(now))} % (${say(mean(before))} %)`;
}

choose();

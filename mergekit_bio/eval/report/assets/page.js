"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const {cells, clips, texts, sweeps} = data, rows = data.rows;
const PAGE = 50;
const field = id => document.getElementById(id);

// An element with attributes and children; texts are never read as markup.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// ---- Downloads

function download(name, content, type) {
  const link = make("a", {download: name, href: URL.createObjectURL(new Blob([content], {type}))});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// The table as the folder's CSV files have it.
function csv(table) {
  const cell = value => /[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  return table.map(row => row.map(value => cell(value === null || value === undefined ? "" : String(value))).join(",") + "\r\n").join("");
}

const of_cell = number => {
  const [sweep, , checkpoint, alpha] = cells[number];
  return [...sweeps[sweep].slice(1), checkpoint, alpha];
};
const CELL = ["run", "dataset", "query", "checkpoint", "alpha"];

function predictionTable(some) {
  const table = some.map(row => {
    const [id, target] = clips[rows.clip[row]];
    return [...of_cell(rows.cell[row]), id, texts[rows.prediction[row]], texts[rows.answer[row]], texts[target], Number(rows.outcome[row] === 0)];
  });
  return [[...CELL, "id", "prediction", "answer", "target", "correct"], ...table];
}

const ratio = (part, whole) => whole ? part / whole : 0;

function labelTable(some) {
  const table = some.flatMap(sweep => sweep.cells.flatMap(([cell, ...columns]) => sweep.labels.map((label, index) => {
    const [count, answered, right, f1, low, high] = columns.map(column => column[index]);
    return [...of_cell(cell), label, count, answered, right, ratio(right, answered), ratio(right, count), f1, low, high];
  })));
  return [[...CELL, "label", "clips", "answered", "right", "precision", "recall", "f1", "low", "high"], ...table];
}

const TABLES = {
  "labels.csv": () => csv(labelTable(data.labels.filter(Boolean))),
  "predictions.csv": () => csv(predictionTable(rows.cell.map((_, row) => row))),
};
const table = name => name in data.tables ? data.tables[name] : TABLES[name]();

// A figure by itself: its colours fall back to those of the light scheme.
function standalone(figure) {
  const svg = figure.querySelector("svg").cloneNode(true), {width, height} = svg.viewBox.baseVal;
  svg.prepend(document.createElementNS(svg.namespaceURI, "rect"));
  for (const [key, value] of Object.entries({width: "100%", height: "100%", fill: "#ffffff"})) svg.firstChild.setAttribute(key, value);
  return {text: new XMLSerializer().serializeToString(svg), width, height};
}

function pictureOf(figure) {
  const {text, width, height} = standalone(figure), image = new Image(), canvas = document.createElement("canvas");
  return new Promise((resolve, reject) => {
    image.onload = () => {
      // 72 points an inch; 216 pixels.
      canvas.width = Math.round(3 * width); canvas.height = Math.round(3 * height);
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob(resolve, "image/png");
    };
    image.onerror = reject;
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  });
}

document.querySelectorAll("button.table").forEach(button => button.addEventListener("click", () => download(button.dataset.name, table(button.dataset.name), "text/csv")));
document.querySelectorAll("button.picture").forEach(button => button.addEventListener("click", async () => {
  const figure = button.closest("figure"), name = button.dataset.name;
  if (name.endsWith(".svg")) download(name, standalone(figure).text, "image/svg+xml");
  else download(name, await pictureOf(figure), "image/png");
}));

// ---- Label by label

function showLabels(details) {
  const sweep = data.labels[Number(details.dataset.sweep)];
  const [controls, place] = [details.querySelector(".controls"), details.querySelector(".tall")];
  if (place.firstChild) return;
  const names = sweep.cells.map(([cell]) => cells[cell][1]);
  const choice = (text, chosen, none) => {
    const select = make("select", {onchange: draw}, ...(none ? [make("option", {value: ""}, none)] : []), ...names.map((name, index) => make("option", {value: index}, name)));
    select.value = chosen < 0 ? "" : chosen;
    return [select, make("label", {}, text, select)];
  };
  const [shown, shownLabel] = choice(sweep.by_alpha ? "alpha" : "model", sweep.best, "");
  const [other, otherLabel] = choice("against", names.length > 1 ? (sweep.best === names.length - 1 ? 0 : names.length - 1) : -1, "none");
  shownLabel.prepend(make("span", {class: "key", "aria-hidden": "true"}));
  otherLabel.prepend(make("span", {class: "key other", "aria-hidden": "true"}));
  controls.append(shownLabel, ...(names.length > 1 ? [otherLabel] : []), make("button", {type: "button", onclick: () => download("labels.csv", csv(labelTable([sweep])), "text/csv")}, "CSV of all"));
  let sorted = "clips", descending = true;

  function draw() {
    const [, count, answered, right, f1, low, high] = sweep.cells[Number(shown.value)];
    const against = other.value === "" ? null : sweep.cells[Number(other.value)][4];
    const columns = [
      ["label", "Label", index => sweep.labels[index]], ["clips", "Clips", index => count[index]],
      ["answered", "Answered", index => answered[index], "wide"], ["right", "Right", index => right[index], "wide"],
      ["precision", "Precision", index => ratio(right[index], answered[index]), "wide"],
      ["recall", "Recall", index => ratio(right[index], count[index]), "wide"], ["f1", `F1 at ${names[Number(shown.value)]}`, index => f1[index]],
      ...(against ? [["other", `F1 at ${names[Number(other.value)]}`, index => against[index], "wide"], ["change", "Change", index => f1[index] - against[index]]] : []),
    ];
    const [, , value] = columns.find(([key]) => key === sorted) || columns[0];
    const order = sweep.labels.map((_, index) => index).sort((one, two) => {
      const [a, b] = [value(one), value(two)];
      const compared = typeof a === "string" ? a.localeCompare(b) : a - b;
      return (descending ? -compared : compared) || sweep.labels[one].localeCompare(sweep.labels[two]);
    });
    const header = columns.map(([key, title, , wide]) => make("th", {scope: "col", class: wide, "aria-sort": key === sorted ? (descending ? "descending" : "ascending") : "none"},
      make("button", {type: "button", class: "sort", "data-key": key, onclick: () => {
        descending = key === sorted ? !descending : key !== "label";
        sorted = key;
        draw();
        place.querySelector(`[data-key="${key}"]`).focus();
      }}, title)));
    const number = (key, amount) => ["clips", "answered", "right"].includes(key) ? String(amount) : (key === "change" && amount > 0 ? "+" : "") + amount.toFixed(3);
    const body = order.map(index => {
      const bar = make("div", {class: "interval", title: `${f1[index].toFixed(3)} [${low[index].toFixed(3)}, ${high[index].toFixed(3)}]`}, make("i"), ...(against ? [make("u")] : []), make("b"));
      bar.children[0].style.left = `${100 * low[index]}%`;
      bar.children[0].style.width = `${100 * (high[index] - low[index])}%`;
      if (against) bar.children[1].style.left = `${100 * against[index]}%`;
      bar.lastChild.style.left = `${100 * f1[index]}%`;
      const [label, ...numbers] = columns;
      const texts = numbers.map(([key, , of, wide]) => make("td", {class: wide}, number(key, of(index)) + (key === "f1" ? ` [${low[index].toFixed(3)}, ${high[index].toFixed(3)}]` : "")));
      return make("tr", {}, make("th", {scope: "row"}, label[2](index) || "no label"), ...texts, make("td", {}, bar));
    });
    place.replaceChildren(make("table", {class: "labels"}, make("thead", {}, make("tr", {}, ...header, make("th", {scope: "col"}, "from 0 to 1"))), make("tbody", {}, ...body)));
  }
  draw();
}

document.querySelectorAll("details.by-label").forEach(details => {
  if (details.open) showLabels(details);
  details.addEventListener("toggle", () => details.open && showLabels(details));
});

// ---- On paper everything is open

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach(details => { details.open = true; if (details.matches(".by-label")) showLabels(details); });
});
window.addEventListener("afterprint", () => opened.forEach(details => { details.open = false; }));

// ---- Predictions

const searched = rows.cell.map((_, row) => {
  const [id, target] = clips[rows.clip[row]];
  return [id, texts[rows.prediction[row]], texts[rows.answer[row]], texts[target]].join("\n").toLowerCase();
});
let found = [], page = 0;

sweeps.forEach(([title], index) => field("sweep").add(new Option(title, index)));
[...new Set(cells.map(cell => cell[1]))].forEach(model => field("model").add(new Option(model)));

function search() {
  const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const sweep = field("sweep").value, model = field("model").value, outcome = field("outcome").value;
  const asked = cells.map(cell => (sweep === "" || cell[0] === Number(sweep)) && (model === "" || cell[1] === model));
  found = [];
  rows.cell.forEach((cell, row) => {
    if (asked[cell] && (outcome === "" || rows.outcome[row] === Number(outcome)) && words.every(word => searched[row].includes(word))) found.push(row);
  });
  page = 0;
  show();
}

function show() {
  const body = document.querySelector("#predictions tbody");
  const start = page * PAGE, end = Math.min(start + PAGE, found.length);
  body.replaceChildren(...found.slice(start, end).map(line));
  field("count").textContent = found.length ? `${start + 1} to ${end} of ${found.length}` : "nothing found";
  field("back").disabled = page === 0;
  field("next").disabled = end >= found.length;
  field("found").hidden = !found.length;
}

function line(row) {
  const [sweep, model] = cells[rows.cell[row]], [id, target] = clips[rows.clip[row]];
  const open = make("button", {type: "button", class: "open", "aria-expanded": "false", "aria-label": `Prompt and recording of ${id}`});
  const names = ["Run and query", "Model", "Prediction", "Matched with", "Target", "Clip"];
  const values = [sweeps[sweep][0], model, texts[rows.prediction[row]], texts[rows.answer[row]] || "no label", texts[target] || "no label", id];
  const looks = {3: ["right", "wrong", "wrong", ""][rows.outcome[row]], 5: "id"};
  const columns = values.map((text, index) => make("td", {"data-column": names[index], class: looks[index] || false}, index === 0 ? make("span", {}, open, text) : index === 2 ? make("div", {class: "long"}, text) : text));
  const element = make("tr", {class: "row"}, ...columns);
  // A click on a row is a click on its button, unless a text was selected.
  const toggle = () => {
    const next = element.nextSibling, closes = next && next.className === "prompt";
    open.setAttribute("aria-expanded", String(!closes));
    if (closes) next.remove(); else element.after(detail(row));
  };
  element.addEventListener("click", () => String(getSelection()) || toggle());
  return element;
}

function detail(row) {
  const [id, , audio] = clips[rows.clip[row]], prompt = rows.prompt[row], wide = make("td", {colspan: 6});
  if (audio >= 0) wide.append(recording(id, data.audio[audio]));
  wide.append(make("pre", {}, prompt < 0 ? "The prompt of this row was not kept." : data.prompts[prompt]));
  return make("tr", {class: "prompt"}, wide);
}

// The spectrogram of what was heard, with the player under it. A click on it plays from there.
function recording(id, source) {
  const player = make("audio", {controls: "", preload: "metadata", src: source, "aria-label": `Recording ${id}`});
  const holder = make("div", {class: "heard"}, player);
  if (!source.startsWith("data:")) {
    holder.prepend(make("p", {class: "soft"}, "This recording is linked, not in the page: it plays while its file is there, and has no spectrogram here."));
    return holder;
  }
  const canvas = make("canvas", {role: "img", "aria-label": `Spectrogram of ${id}, 0 to 8 kHz`});
  const head = make("span", {class: "head"}), frame = make("div", {class: "spectrogram"}, canvas);
  holder.prepend(frame);
  drawSpectrogram(canvas, source).then(seconds => {
    canvas.dataset.seconds = seconds;
    for (const khz of [0, 2, 4, 6, 8]) {
      const mark = make("span", {class: "khz"}, khz === 8 ? "8 kHz" : String(khz));
      mark.style.top = `${100 - khz * 12.5}%`;
      frame.append(mark);
    }
    const step = seconds > 5 ? 2 : seconds > 2 ? 1 : 0.5;
    for (let time = 0; time <= seconds; time += step) {
      const mark = make("span", {class: "time"}, `${time} s`);
      mark.style.left = `${100 * time / seconds}%`;
      frame.append(mark);
    }
    frame.append(head);
    const follow = () => { head.style.left = `${100 * player.currentTime / seconds}%`; };
    player.addEventListener("timeupdate", follow);
    canvas.addEventListener("click", event => {
      player.currentTime = seconds * event.offsetX / canvas.clientWidth;
      follow();
      player.play();
    });
  }).catch(() => frame.replaceWith(make("p", {class: "soft"}, "This browser cannot decode the recording.")));
  return holder;
}

let timer;
field("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, 120); });
["sweep", "model", "outcome"].forEach(id => field(id).addEventListener("change", search));
field("back").addEventListener("click", () => { page -= 1; show(); });
field("next").addEventListener("click", () => { page += 1; show(); });
field("found").addEventListener("click", () => download("predictions.csv", csv(predictionTable(found)), "text/csv"));
search();

"use strict";
// Columns of a row, as gallery.py writes them.
const [ID, TEXT, LABEL, PREDICTION, CONFIDENCE, AGREEMENT, RIGHT, WHO, DOUBTED, PHOTO, TWINS] = Array(11).keys();
const PAGE = 12;
const FIRST = 10; // rows of a long table
const FEW = 4; // rows that need no order
const MEMBERS = 5; // ids of near duplicates on a card
const find = (id) => document.getElementById(id);
const orders = {
  sure: (a, b) => b[CONFIDENCE] - a[CONFIDENCE],
  unsure: (a, b) => a[CONFIDENCE] - b[CONFIDENCE],
  id: (a, b) => a[ID].localeCompare(b[ID], undefined, { numeric: true }),
};

const statuses = {
  wrong: (row) => row[RIGHT] === 0,
  doubted: (row) => row[DOUBTED],
  unlike: (row) => row.unlike,
  twins: (row) => row[TWINS],
  waiting: (row) => row[RIGHT] === null,
  right: (row) => row[RIGHT] === 1,
  all: () => true,
};

async function unpack(id) {
  const bytes = Uint8Array.from(atob(find(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function element(name, type, text) {
  const made = document.createElement(name);
  if (type) made.className = type;
  if (text !== undefined) made.textContent = text; // never HTML: texts are strangers'
  return made;
}

function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function card(row, photos) {
  const item = element("li");
  const photo = photos[row.place];
  if (photo) {
    const image = element("img");
    image.src = "data:image/webp;base64," + photo;
    image.alt = "photo of sample " + row[ID];
    image.loading = "lazy";
    const frame = element("button", "photo");
    frame.type = "button";
    frame.setAttribute("aria-label", "Enlarge the photo of sample " + row[ID]);
    frame.append(image);
    item.append(frame);
  } else if (photos.some) {
    item.append(element("div", "none", row[PHOTO] ? (photo === "" ? "photo cannot be read" : "photo not in this page") : "no photo"));
  }
  const body = element("div", "body");
  const said = element("div", "said");
  const type = { 0: "wrong", 1: "right" }[row[RIGHT]];
  said.append(element("span", type, { 0: "✗ ", 1: "✓ " }[row[RIGHT]] || ""), row[PREDICTION]);
  said.append(row[CONFIDENCE] > 0.99 ? " > 99%" : " " + Math.round(100 * row[CONFIDENCE]) + "%");
  body.append(said);
  if (row[RIGHT] === 0) body.append(element("div", "", "label " + row[LABEL]));
  body.append(element("div", "text", row[TEXT] || "no text"));
  const facts = ["id " + row[ID]];
  const head = find("samples").dataset.head; // that the inputs decide for, where another than the page's
  if (row[WHO]) facts.push((head && head + ": ") + "decided by " + row[WHO]);
  if (row[DOUBTED]) facts.push("label in doubt");
  if (row.twins) facts.push("near duplicate of " + row.twins.filter((twin) => twin !== row).slice(0, MEMBERS).map((twin) => twin[ID] + " (" + twin[LABEL] + ")").join(", "));
  if (row[AGREEMENT] < 1) facts.push(Math.round(100 * row[AGREEMENT]) + "% of the seeds agree"); // of older runs
  body.append(element("div", "facts", facts.join(" · ")));
  item.append(body);
  return item;
}

// Whether a cell, a|b where samples may have several classes, names a class.
function names(cell, name, classes) {
  return cell === name || (!classes.has(cell) && cell.split("|").includes(name));
}

function matches(row, wanted, classes) {
  return (
    statuses[wanted.status](row) &&
    (!wanted.label || names(row[LABEL], wanted.label, classes)) &&
    (!wanted.prediction || names(row[PREDICTION], wanted.prediction, classes)) &&
    (!wanted.who || row[WHO] === wanted.who) &&
    (!wanted.words || row.words.includes(wanted.words.trim().toLowerCase()))
  );
}

function prepare(rows) {
  const groups = new Map();
  rows.forEach((row, place) => {
    row.place = place;
    row.words = (row[ID] + " " + row[TEXT]).toLowerCase();
    if (row[TWINS]) groups.set(row[TWINS], [...(groups.get(row[TWINS]) || []), row]);
  });
  for (const twins of groups.values()) {
    const unlike = new Set(twins.map((twin) => twin[LABEL])).size > 1;
    for (const row of twins) [row.twins, row.unlike] = [twins, unlike];
  }
}

// The table that mmfeat heads --labels reads once a person has filled the last column.
function csv(rows) {
  const cell = (value) => '"' + String(value).replaceAll('"', '""') + '"';
  const lines = rows.map((row) => [row[ID], row[TEXT], row[LABEL], row[PREDICTION], row[CONFIDENCE], ""].map(cell));
  return [["id", "text", "given", "proposed", "probability", "label"], ...lines].map((line) => line.join(",") + "\r\n").join("");
}

function start(rows, photos) {
  prepare(rows);
  photos.some = rows.some((row) => row[PHOTO]);
  const form = find("filters");
  if (!rows.some(statuses.wrong)) form.querySelector("[name=status][value=all]").defaultChecked = true;
  const classes = new Set(Array.from(form.label.options, (option) => option.value));
  const usual = Object.fromEntries(new FormData(form));
  let found = [];
  let page = 1;

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(1, page), pages);
    find("samples").replaceChildren(...found.slice((page - 1) * PAGE, page * PAGE).map((row) => card(row, photos)));
    const count = found.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " samples";
    find("count").textContent = found.length ? count : count + "; no sample fits all of these filters";
    find("page").value = page;
    find("page").max = pages;
    find("pages").textContent = "of " + pages.toLocaleString("en");
    find("previous").disabled = page === 1;
    find("next").disabled = page === pages;
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    found = rows.filter((row) => matches(row, wanted, classes)).sort(orders[wanted.sort]);
    if (wanted.status === "twins" || wanted.status === "unlike") found.sort((a, b) => a[TWINS] - b[TWINS]);
    page = 1;
    show();
  }

  function remember() {
    const set = Object.entries({ ...Object.fromEntries(new FormData(form)), page: String(page) });
    const changed = new URLSearchParams(set.filter(([name, value]) => value !== { ...usual, page: "1" }[name])).toString();
    history.replaceState(null, "", changed ? "#gallery?" + changed : "#gallery");
  }

  function recall() {
    if (!location.hash.startsWith("#gallery?")) return;
    form.reset();
    const wanted = new URLSearchParams(location.hash.slice(9));
    for (const [name, value] of wanted) if (form.elements[name]) form.elements[name].value = value;
    filter();
    turn(Number(wanted.get("page")) || 1);
    find("gallery").scrollIntoView();
  }

  function turn(to) {
    page = to;
    show();
  }

  function step(to) {
    turn(to);
    remember();
    find("filters").scrollIntoView({ block: "start" });
  }

  function change() {
    filter();
    remember();
  }

  form.hidden = find("pager").hidden = find("copy").hidden = find("download").hidden = false;
  form.who.parentElement.hidden = !rows.some((row) => row[WHO]);
  for (const input of form.status) {
    const count = rows.filter(statuses[input.value]).length;
    input.parentElement.querySelector("b").textContent = count.toLocaleString("en");
    input.parentElement.hidden = !count && input.value !== "wrong";
  }
  form.addEventListener("change", change);
  form.words.addEventListener("input", change);
  form.addEventListener("submit", (event) => event.preventDefault());
  find("previous").addEventListener("click", () => step(page - 1));
  find("next").addEventListener("click", () => step(page + 1));
  find("page").addEventListener("change", (event) => step(Number(event.target.value) || 1));
  find("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(found.map((row) => row[ID]).join("\n") + "\n");
      find("count").textContent = found.length.toLocaleString("en") + " ids copied";
    } catch {
      find("count").textContent = "this browser lets no page copy here; the CSV has the ids";
    }
  });
  find("download").addEventListener("click", () => {
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([csv(found)], { type: "text/csv" }));
    link.download = "samples.csv";
    link.click();
  });
  addEventListener("hashchange", recall);
  filter();
  recall();
}

// The number that a cell begins with, for columns in which every cell has one.
const number = (text) => (/^[<≥]? ?[+-]?[\d,]*\.?\d/.test(text) ? parseFloat(text.replace(/[<≥, ]/g, "")) : NaN);

function sortable(table) {
  const body = table.tBodies[0];
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    if (body.rows.length <= FEW || !head.textContent.trim()) return;
    const made = button("↕", () => {
      const text = (row) => row.cells[column].textContent.trim();
      const rows = Array.from(body.rows);
      const numeric = rows.every((row) => !text(row) || !isNaN(number(text(row))));
      const down = head.ariaSort ? head.ariaSort !== "descending" : numeric;
      const compare = numeric ? (a, b) => number(text(a)) - number(text(b)) : (a, b) => text(a).localeCompare(text(b));
      const filled = rows.filter(text).sort((a, b) => (down ? compare(b, a) : compare(a, b)));
      body.append(...filled, ...rows.filter((row) => !text(row)));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.ariaSort = down ? "descending" : "ascending";
    });
    made.className = "sort";
    made.setAttribute("aria-label", "Sort by " + head.textContent.trim());
    head.append(made);
  });
  if (body.rows.length <= FIRST + 2) return;
  table.classList.add("short");
  const all = button("Show all " + body.rows.length + " rows", () => {
    table.classList.remove("short");
    all.remove();
  });
  table.after(all);
}

for (const table of document.querySelectorAll("main table:not(.heat)")) sortable(table);
document.addEventListener("click", (event) => {
  const frame = event.target.closest(".photo");
  const dialog = find("large");
  if (frame) {
    dialog.querySelector("img").src = frame.querySelector("img").src;
    dialog.querySelector("img").alt = frame.querySelector("img").alt;
    dialog.querySelector("p").textContent = frame.parentElement.querySelector(".text").textContent;
    dialog.showModal();
  } else if (event.target === dialog || event.target.closest("#large button")) dialog.close();
});

const SERIES = ["#3b82c4", "#d9782d", "#3f9a6b", "#b8559b", "#7a6fd0", "#9a8a2c", "#2f9fb0"]; // as in plots.py
const OTHERS = "#8d8d8d";
const NEAR = 30; // pixels
const kinds = {
  label: (row) => row[LABEL],
  prediction: (row) => row[PREDICTION],
  right: (row) => (row[RIGHT] ? "right" : "wrong"),
  who: (row) => row[WHO],
};

// The map: `points` are [row, x, y], with x and y from 0 to 1000.
function draw(points, rows, photos) {
  const canvas = find("points");
  const form = find("colouring");
  points.sort((a, b) => a[1] - b[1]); // the order of the arrow keys
  let chosen = -1;

  function at([, x, y]) {
    return [8 + (x / 1000) * (canvas.clientWidth - 16), 8 + (1 - y / 1000) * (canvas.clientHeight - 16)];
  }

  function paint() {
    const kind = kinds[form.colour.value];
    const counts = new Map();
    for (const [row] of points) counts.set(kind(rows[row]), (counts.get(kind(rows[row])) || 0) + 1);
    const names = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a)).slice(0, SERIES.length).sort();
    const colours = new Map(names.map((name, place) => [name, SERIES[place]]));
    canvas.width = canvas.clientWidth * devicePixelRatio;
    canvas.height = canvas.clientHeight * devicePixelRatio;
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    const dot = (point, size, alpha) => {
      context.globalAlpha = alpha;
      context.fillStyle = colours.get(kind(rows[point[0]])) || OTHERS;
      context.beginPath();
      context.arc(...at(point), size, 0, 7);
      context.fill();
    };
    for (const point of points) dot(point, 3, 0.65);
    if (chosen >= 0) {
      dot(points[chosen], 7, 1);
      context.strokeStyle = getComputedStyle(canvas).color;
      context.stroke();
    }
    const shown = names.map((name) => [name, colours.get(name), counts.get(name)]);
    const rest = points.length - shown.reduce((sum, entry) => sum + entry[2], 0);
    if (rest) shown.push(["others", OTHERS, rest]);
    find("legend").replaceChildren(...shown.map(([name, colour, count]) => {
      const item = element("li", "", name + " " + count.toLocaleString("en"));
      item.style.borderColor = colour;
      return item;
    }));
  }

  function choose(place) {
    if (place === chosen) return;
    chosen = place;
    find("pointed").replaceChildren(card(rows[points[place][0]], photos));
    paint();
  }

  function point(event) {
    let best = -1;
    let nearest = NEAR * NEAR;
    points.forEach((candidate, place) => {
      const [x, y] = at(candidate);
      const distance = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (distance < nearest) [best, nearest] = [place, distance];
    });
    if (best >= 0) choose(best);
  }

  if (!rows.some((row) => row[WHO])) form.colour.querySelector("[value=who]").remove();
  form.hidden = false;
  form.colour.addEventListener("change", paint);
  form.addEventListener("submit", (event) => event.preventDefault());
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose((chosen + step + points.length + (chosen < 0 && step < 0)) % points.length);
  });
  new ResizeObserver(paint).observe(canvas);
}

if (find("rows")) Promise.all([unpack("rows"), unpack("photos")]).then(
  ([rows, photos]) => {
    start(rows, photos);
    if (find("places")) unpack("places").then((points) => draw(points, rows, photos));
  },
  (error) => { find("count").textContent = "The samples cannot be shown: " + error.message + ". A browser of 2023 or later can."; },
);

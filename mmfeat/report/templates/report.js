"use strict";
// Columns of a row, as gallery.py writes them.
const [ID, TEXT, LABEL, PREDICTION, CONFIDENCE, AGREEMENT, RIGHT, WHO, DOUBTED, PHOTO] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
const PAGE = 24;
const find = (id) => document.getElementById(id);
const orders = {
  sure: (a, b) => b[CONFIDENCE] - a[CONFIDENCE],
  unsure: (a, b) => a[CONFIDENCE] - b[CONFIDENCE],
  split: (a, b) => a[AGREEMENT] - b[AGREEMENT],
  id: (a, b) => a[ID].localeCompare(b[ID], undefined, { numeric: true }),
};

const statuses = {
  "": () => true,
  wrong: (row) => !row[RIGHT],
  right: (row) => row[RIGHT],
  doubted: (row) => row[DOUBTED],
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

function card(row, photos) {
  const item = element("li");
  const photo = photos[row.place];
  if (photo) {
    const image = element("img");
    image.src = "data:image/webp;base64," + photo;
    image.alt = "photo of sample " + row[ID];
    image.loading = "lazy";
    item.append(image);
  } else {
    item.append(element("div", "none", row[PHOTO] ? (photo === "" ? "photo cannot be read" : "photo not in this page") : "no photo"));
  }
  const body = element("div", "body");
  const said = element("div", "said");
  said.append(element("span", row[RIGHT] ? "right" : "wrong", (row[RIGHT] ? "✓ " : "✗ ") + row[PREDICTION]));
  said.append(row[CONFIDENCE] > 0.99 ? " > 99 %" : " " + Math.round(100 * row[CONFIDENCE]) + " %");
  body.append(said);
  if (!row[RIGHT]) body.append(element("div", "facts", "label " + row[LABEL]));
  body.append(element("div", "text", row[TEXT] || "no text"));
  const facts = ["id " + row[ID]];
  if (row[WHO]) facts.push("flipped by " + row[WHO]);
  if (row[DOUBTED]) facts.push("label in doubt");
  if (row[AGREEMENT] < 1) facts.push(Math.round(100 * row[AGREEMENT]) + " % of the seeds agree");
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
    (!wanted.words || row.words.includes(wanted.words))
  );
}

function start(rows, photos) {
  rows.forEach((row, place) => {
    row.place = place;
    row.words = (row[ID] + " " + row[TEXT]).toLowerCase();
  });
  const form = find("filters");
  const classes = new Set(Array.from(form.label.options, (option) => option.value));
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
    wanted.words = wanted.words.trim().toLowerCase();
    found = rows.filter((row) => matches(row, wanted, classes)).sort(orders[wanted.sort]);
    page = 1;
    show();
  }

  function turn(to) {
    page = to;
    show();
    find("count").scrollIntoView({ block: "start" });
  }

  form.hidden = find("pager").hidden = false;
  form.who.parentElement.hidden = !rows.some((row) => row[WHO]);
  for (const select of form.querySelectorAll("select")) select.addEventListener("change", filter);
  form.words.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  find("previous").addEventListener("click", () => turn(page - 1));
  find("next").addEventListener("click", () => turn(page + 1));
  find("page").addEventListener("change", (event) => turn(Number(event.target.value) || 1));
  filter();
}

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

Promise.all([unpack("rows"), unpack("photos")]).then(
  ([rows, photos]) => {
    start(rows, photos);
    if (find("places")) unpack("places").then((points) => draw(points, rows, photos));
  },
  (error) => { find("count").textContent = "The samples cannot be shown: " + error.message + ". A browser of 2023 or later can."; },
);

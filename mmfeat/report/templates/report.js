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

Promise.all([unpack("rows"), unpack("photos")]).then(
  ([rows, photos]) => start(rows, photos),
  (error) => { find("count").textContent = "The samples cannot be shown: " + error.message + ". A browser of 2023 or later can."; },
);

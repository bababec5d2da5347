
"use strict";
// The trace browser. Everything a model wrote goes into text nodes and nowhere else.

const $ = (id) => document.getElementById(id);
const form = document.querySelector("#browser form");
const list = $("list"), spacer = $("spacer"), detail = $("detail"), found = $("found");
const OVERSCAN = 6;
// Control characters, marks that turn the reading direction, and other invisible ones: shown as codes.
const HIDDEN = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\uffff]/;
const NUMBER = new Intl.NumberFormat("en");

let data, traces, pairs;   // as packed by the report
let lowered = [], asked = [];  // lower-cased haystacks: of traces, of problems
let pairsOf, unusedOf;     // trace -> its pairs, its [round, reason]s
let shown = [], at = -1;   // rows that pass the filters; the selected one's place among them
let rowHeight = 58, drawn = new Map();
let waiting = 0;           // the timer between a key and the search

async function unpack() {
  const packed = $("data").textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function element(name, classes, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

/** Text as nodes: hidden characters as codes, `hit` (lower case) marked. */
function written(text, hit = "") {
  const nodes = [];
  const plain = (part) => {
    if (!HIDDEN.test(part)) { nodes.push(document.createTextNode(part)); return; }
    let run = "";
    for (const letter of part) {
      if (!HIDDEN.test(letter)) { run += letter; continue; }
      if (run) nodes.push(document.createTextNode(run));
      run = "";
      nodes.push(element("span", "code", "U+" + letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
    }
    if (run) nodes.push(document.createTextNode(run));
  };
  const low = hit ? text.toLowerCase() : "";
  let from = 0;
  if (hit && low.length === text.length) {
    for (let place = low.indexOf(hit); place >= 0; place = low.indexOf(hit, from)) {
      plain(text.slice(from, place));
      const start = nodes.length;
      plain(text.slice(place, place + hit.length));
      nodes.push(element("mark", "", ...nodes.splice(start)));
      from = place + hit.length;
    }
  }
  plain(text.slice(from));
  return nodes;
}

const literal = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

/** Where a trace states its answer: [start, end] of the quoted sentence and of the answer in it; null if not found. */
function statement(text, reason, answer) {
  const first = reason.indexOf('"');
  let last = reason.lastIndexOf('"');
  if (first < 0 || last <= first) return null;
  const quote = reason.slice(first + 1, last).replace(/…$/, "").trim();
  if (!quote) return null;
  const pattern = new RegExp(quote.split(/\s+/).map(literal).join("\\s+"), "g");
  let match = null;
  for (const each of text.matchAll(pattern)) match = each;
  if (!match) return null;
  const start = match.index, end = start + match[0].length;
  const place = answer ? match[0].toLowerCase().lastIndexOf(answer.toLowerCase()) : -1;
  return place < 0 ? [start, end, end, end] : [start, end, start + place, start + place + answer.length];
}

/** A trace's text with the statement of its answer underlined and the answer framed. */
function marked(trace, hit) {
  const text = traces.text[trace];
  const places = statement(text, traces.reason[trace], traces.answer[trace] || "");
  const block = element("pre", "text");
  block.tabIndex = 0;
  if (!places) { block.append(...written(text, hit)); return block; }
  const [start, end, from, to] = places;
  const stated = element("span", "stated", ...written(text.slice(start, from), hit));
  if (to > from) {
    const answer = element("span", "answer", ...written(text.slice(from, to), hit));
    answer.title = "the answer that was read";
    stated.append(answer, ...written(text.slice(to, end), hit));
  }
  block.append(...written(text.slice(0, start), hit), stated, ...written(text.slice(end), hit));
  return block;
}

const stageOf = (trace) => data.stages[traces.stage[trace]];
const problemOf = (trace) => data.problems[traces.problem[trace]];

function badge(trace) {
  const outcome = data.outcomes[traces.outcome[trace]];
  return element("span", "badge o-" + (/^[a-z]+$/.test(outcome) ? outcome : "none"), outcome);
}

function card(trace, title, hit) {
  const [stage, policy] = stageOf(trace);
  const cut = traces.cut[trace] ? ", cut at max_new_tokens" : "";
  const tokens = traces.tokens[trace] === null ? "" : `, ${NUMBER.format(traces.tokens[trace])} tokens`;
  const box = element("div", "card", element("h4", "", title || policy, badge(trace)));
  box.append(element("p", "note", ...written(`${title ? policy + ", " : ""}sample ${traces.index[trace]}${stage === policy ? "" : " of " + stage}${tokens}${cut}`)));
  const answer = traces.answer[trace];
  const read = answer === null ? "No answer was read." : "Answer read: ";
  box.append(element("p", "", read, answer === null ? "" : element("strong", "", ...written(answer))));
  if (traces.reason[trace]) box.append(element("p", "", "Reason: ", ...written(traces.reason[trace])));
  box.append(marked(trace, hit));
  for (const [round, reason] of unusedOf.get(trace) || [])
    box.append(element("p", "note", ...written(`Round ${round}: in no pair, ${data.unused.reasons[reason]}.`)));
  return box;
}

function button(text, act) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function question(trace, hit) {
  const [id, split, text, answer, choices] = problemOf(trace);
  const head = element("h3", "", "Problem ", ...written(id), split ? ` (${split})` : "");
  const block = element("div", "", head, element("p", "question", ...written(text, hit)));
  choices.forEach((choice, place) =>
    block.append(element("p", "question", String.fromCharCode(65 + place) + ". ", ...written(choice, hit))));
  if (answer) block.append(element("p", "", "Right answer: ", element("strong", "", ...written(answer))));
  return block;
}

function show() {
  detail.replaceChildren();
  if (at < 0) { detail.append(element("p", "note", "Nothing passes these filters.")); return; }
  const hit = form.search.value.trim().toLowerCase();
  const row = shown[at], byPair = form.mode.value === "pairs";
  const trace = byPair ? pairs.chosen[row] : row;
  detail.append(question(trace, hit));
  const links = element("div", "links", button("Only this problem", () => narrow(problemOf(trace)[0])));
  if (byPair) {
    const rejected = pairs.rejected[row];
    const sides = element("div", "sides", card(trace, "Chosen", hit));
    if (rejected >= 0) sides.append(card(rejected, "Rejected", hit));
    detail.append(element("p", "note", `Pair of round ${pairs.round[row]}`), sides);
  } else {
    detail.append(card(trace, "", hit));
    for (const pair of (pairsOf.get(trace) || []).slice(0, 24)) {
      const chosen = pairs.chosen[pair] === trace, other = chosen ? pairs.rejected[pair] : pairs.chosen[pair];
      const against = other < 0 ? "" : ` against ${stageOf(other)[1]}, sample ${traces.index[other]}`;
      links.append(button(`Round ${pairs.round[pair]}: ${chosen ? "chosen" : "rejected"}${against}`, () => open(pair)));
    }
  }
  links.append(button("Back to the list", () => list.focus()));
  detail.append(links);
  detail.scrollTop = 0;
}

function narrow(problem) { form.problem.value = problem; filter(); list.focus(); }

function open(pair) {
  for (const name of ["round", "policy", "outcome", "kind", "search"]) form[name].value = "";
  form.mode.value = "pairs";
  form.problem.value = problemOf(pairs.chosen[pair])[0];
  filter();
  select(Math.max(0, shown.indexOf(pair)));
  detail.focus();
}

function filter() {
  clearTimeout(waiting);
  const { mode, round, policy, outcome, kind, problem, search } = form;
  const byPair = mode.value === "pairs";
  kind.disabled = byPair;
  const needle = search.value.trim().toLowerCase(), id = problem.value.trim().toLowerCase();
  const exact = data.problems.some((each) => each[0].toLowerCase() === id);
  const near = data.problems.map((each, place) => {
    const own = each[0].toLowerCase();
    return { passes: !id || (exact ? own === id : own.includes(id)), asks: needle && asked[place].includes(needle) };
  });
  const stages = data.stages.map(([, writer, number, use]) =>
    (!policy.value || writer === policy.value) && (byPair || ((!round.value || String(number) === round.value)
      && (!kind.value || use === kind.value))));
  const verdict = outcome.value === "" ? -1 : Number(outcome.value);
  const says = (trace) => !needle || near[traces.problem[trace]].asks || lowered[trace].includes(needle);
  const rows = [];
  if (byPair) {
    for (let row = 0; row < pairs.round.length; row++) {
      const chosen = pairs.chosen[row], rejected = pairs.rejected[row], other = rejected < 0 ? chosen : rejected;
      if (near[traces.problem[chosen]].passes && (!round.value || String(pairs.round[row]) === round.value)
        && (stages[traces.stage[chosen]] || stages[traces.stage[other]])
        && (verdict < 0 || traces.outcome[chosen] === verdict || traces.outcome[other] === verdict)
        && (says(chosen) || says(other))) rows.push(row);
    }
  } else {
    for (let row = 0; row < traces.stage.length; row++)
      if (stages[traces.stage[row]] && near[traces.problem[row]].passes
        && (verdict < 0 || traces.outcome[row] === verdict) && says(row)) rows.push(row);
  }
  shown = rows;
  const all = byPair ? pairs.round.length : traces.stage.length;
  found.textContent = `${NUMBER.format(rows.length)} of ${NUMBER.format(all)} ${byPair ? "pairs" : "traces"}`;
  spacer.style.height = rows.length * rowHeight + "px";
  list.scrollTop = 0;
  for (const node of drawn.values()) node.remove();
  drawn.clear();
  at = rows.length ? 0 : -1;
  draw();
  show();
}

function snippet(text, needle) {
  const flat = text.slice(0, 4000).replace(/\s+/g, " ").trim();
  const place = needle ? flat.toLowerCase().indexOf(needle) : -1;
  const start = place > 30 ? place - 20 : 0;
  return element("div", "snippet", ...written((start ? "… " : "") + flat.slice(start, start + 180), needle));
}

function rowNode(place) {
  const row = shown[place], byPair = form.mode.value === "pairs";
  const needle = form.search.value.trim().toLowerCase();
  const trace = byPair ? pairs.chosen[row] : row;
  const head = element("div", "head", element("strong", "", ...written(problemOf(trace)[0])));
  let text = traces.text[trace];
  if (byPair) {
    const rejected = pairs.rejected[row];
    head.append(element("span", "", `round ${pairs.round[row]}, ${stageOf(trace)[1]}`
      + (rejected < 0 ? "" : ` against ${stageOf(rejected)[1]}`)));
    if (rejected >= 0) text = traces.text[rejected];
  } else {
    const [, policy, number, kind] = stageOf(trace);
    head.append(element("span", "", `${policy}${number ? ", round " + number : ""}, ${kind}`), badge(trace));
  }
  const node = element("div", "row", head, snippet(text, needle));
  node.id = "row-" + place;
  node.setAttribute("role", "option");
  node.setAttribute("aria-setsize", String(shown.length));
  node.setAttribute("aria-posinset", String(place + 1));
  node.setAttribute("aria-selected", String(place === at));
  node.style.transform = `translateY(${place * rowHeight}px)`;
  return node;
}

/** Put the rows in view into the list, and take the others out. */
function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / rowHeight) - OVERSCAN);
  const last = Math.min(shown.length - 1, Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + OVERSCAN);
  for (const [place, node] of drawn) {
    if (place < first || place > last) { node.remove(); drawn.delete(place); }
  }
  for (let place = first; place <= last; place++) {
    if (!drawn.has(place)) { const node = rowNode(place); drawn.set(place, node); list.append(node); }
  }
  list.setAttribute("aria-activedescendant", at >= 0 && drawn.has(at) ? "row-" + at : "");
}

function select(place) {
  if (!shown.length) return;
  const before = drawn.get(at);
  if (before) before.setAttribute("aria-selected", "false");
  at = Math.max(0, Math.min(shown.length - 1, place));
  const top = at * rowHeight;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + rowHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + rowHeight - list.clientHeight;
  draw();
  if (drawn.has(at)) drawn.get(at).setAttribute("aria-selected", "true");
  show();
}

function keys(event) {
  const page = Math.max(1, Math.floor(list.clientHeight / rowHeight) - 1);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: shown.length - 1 };
  if (event.key in moves) { select(moves[event.key]); event.preventDefault(); }
  else if (event.key === "Enter") { detail.focus(); detail.scrollIntoView({ block: "nearest" }); event.preventDefault(); }
}

function choose(name, options) {
  form[name].replaceChildren(new Option("all", ""), ...options.map(([value, text]) => new Option(text, value)));
}

function fill() {
  const rounds = [...new Set([...data.stages.map((stage) => stage[2]), ...pairs.round])].sort((a, b) => a - b);
  choose("round", rounds.map((number) => [String(number), number ? String(number) : "0, initial"]));
  choose("policy", [...new Set(data.stages.map((stage) => stage[1]))].map((name) => [name, name]));
  const outcomes = [...new Set(traces.outcome)].sort((a, b) => a - b);
  choose("outcome", outcomes.map((number) => [String(number), data.outcomes[number]]));
  const kinds = [["sampled", "training"], ["evaluated", "evaluation"]];
  choose("kind", kinds.filter(([kind]) => data.stages.some((stage) => stage[3] === kind)));
}

function grouped(count, add) {
  const groups = new Map();
  for (let row = 0; row < count; row++)
    add(row, (key, value) => { if (groups.has(key)) groups.get(key).push(value); else groups.set(key, [value]); });
  return groups;
}

async function start() {
  data = await unpack();
  ({ traces, pairs } = data);
  asked = data.problems.map(([id, , text, answer, choices]) => [id, text, answer, ...choices].join("\n").toLowerCase());
  lowered = traces.text.map((text, row) => (text + "\n" + (traces.answer[row] || "") + "\n" + traces.reason[row]).toLowerCase());
  pairsOf = grouped(pairs.round.length, (row, put) => { put(pairs.chosen[row], row); if (pairs.rejected[row] >= 0) put(pairs.rejected[row], row); });
  unusedOf = grouped(data.unused.round.length, (row, put) => put(data.unused.trace[row], [data.unused.round[row], data.unused.reason[row]]));
  fill();
  $("browser").hidden = false;
  rowHeight = Math.round(3.6 * parseFloat(getComputedStyle(document.documentElement).fontSize));
  filter();
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 80); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
    event.preventDefault();
    filter();
    list.focus();
  });
  form.addEventListener("reset", () => setTimeout(filter));
  list.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  list.addEventListener("keydown", keys);
  list.addEventListener("click", (event) => {
    const node = event.target.closest(".row");
    if (!node) return;
    select(Number(node.id.slice(4)));
    if (list.getBoundingClientRect().bottom <= detail.getBoundingClientRect().top) detail.scrollIntoView({ block: "start" });
  });
  detail.addEventListener("keydown", (event) => { if (event.key === "Escape") list.focus(); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    event.preventDefault();
    form.search.focus();
  });
}

window.addEventListener("load", () => setTimeout(() => start().catch((error) => {
  $("browser").hidden = false;
  found.textContent = "The traces could not be read: this page needs a browser of 2023 or later. " + error;
})));

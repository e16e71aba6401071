// The page: signs in, shows items, keeps the ranking of the current one, and hands answers to the queue.

import { SignedOut, request } from "./api.js";
import { Board } from "./board.js";
import { buildCards, findCard, showPrompt, updateCards } from "./cards.js";
import { announce, byId, notice, showOnly } from "./dom.js";
import { watchDrags } from "./drag.js";
import { listenForKeys } from "./keys.js";
import { showConnection, showProgress, startGuidelines, startView } from "./panels.js";
import { Queue } from "./queue.js";
import * as ranking from "./ranking.js";
import { signIn, signOut } from "./session.js";
import { keep, kept, names } from "./storage.js";
import { seconds, startTimer } from "./timer.js";
import { Work } from "./work.js";

const PAST = 30; // answers that undo reaches back to
const RETRY_MS = 2500;

const queue = new Queue({
  state: showConnection,
  acknowledged: (reply) => { work.progress = reply.progress; showProgress(work.progress, queue.waiting.length); },
  refused: (text, name) => notice(`An answer was not accepted. ${text}`, () => keep(name, null)),
  signedOut: () => start(),
});
const work = new Work(() => (editing < 0 ? current : set), () => queue.items);
let study = null;
let current = null; // {item, prompt, answers}
let places = [];
let steps = []; // places before each change of the current item
let last = -1; // the answer placed last
let cards = [];
let board = null;
let past = []; // answers given: {id, item, prompt, answers, ranks, kind}
let editing = -1; // index in `past` of the answer that is being changed
let set = null; // the item put aside meanwhile
let timer = 0;

// --- the current item -------------------------------------------------------------------------------------------------

function show(item, shown = null) {
  current = item;
  steps = [];
  last = -1;
  places = shown ?? kept(`draft:${item.item}`) ?? ranking.blank(item.answers.length);
  showOnly("work");
  byId("editing").hidden = editing < 0;
  byId("title").textContent = study.title;
  showPrompt(item.prompt);
  cards = buildCards(item.answers, (i, place) => change(i, place === 0 ? ranking.cannotJudge(places, i) : ranking.put(places, i, place)));
  board = new Board(item.answers.length, (i) => findCard(cards, i), chipKey);
  draw();
  window.scrollTo(0, 0);
  byId("answers").scrollLeft = 0;
  byId("title").focus({ preventScroll: true });
  announce(`${editing < 0 ? "Next item" : "Changing a saved ranking"}: ${item.answers.length} answers.`);
  startTimer();
}

function draw() {
  updateCards(cards, places);
  board.draw(places);
  const problem = ranking.missing(places);
  byId("missing").textContent = problem;
  byId("save").setAttribute("aria-disabled", String(problem !== ""));
  byId("undo").disabled = steps.length === 0 && (editing < 0 ? past.length : editing) === 0;
}

function change(i, next) {
  if (next.join() === places.join()) { draw(); return; }
  steps.push(places);
  places = next;
  last = i;
  keep(`draft:${current.item}`, places);
  draw();
  announce(`${ranking.LETTERS[i]} ${ranking.describe(places, i)}. ${ranking.missing(places)}`);
}

function chipKey(event, i) {
  const moves = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 };
  if (event.key in moves) change(i, ranking.step(places, i, moves[event.key]));
  else if (event.key === "Delete") change(i, ranking.clear(places, i));
  else return;
  event.preventDefault();
}

function dropped(i, where) {
  const moved = {
    tie: () => ranking.put(places, i, where.place),
    before: () => ranking.insertBefore(places, i, where.place),
    end: () => ranking.append(places, i),
    none: () => ranking.cannotJudge(places, i),
    unplaced: () => ranking.clear(places, i),
  };
  change(i, moved[where.kind]());
}

// --- answers ----------------------------------------------------------------------------------------------------------

function save() {
  const problem = ranking.missing(places);
  if (problem) { announce(problem); return; }
  answer("ranking", ranking.toRanks(places));
}

function answer(kind, ranks) {
  const replaces = editing < 0 ? null : past[editing].id;
  const sent = queue.add({ item: current.item, kind, ranks, seconds: seconds(), replaces });
  const entry = { ...current, id: sent.id, kind, ranks };
  work.answered.add(current.item);
  keep(`draft:${current.item}`, null);
  if (editing < 0) past = [...past, entry].slice(-PAST);
  else past[editing] = entry;
  showProgress(work.progress, queue.waiting.length);
  if (editing < 0) { current = null; advance(); } else stopEditing();
}

function undo() {
  if (steps.length) {
    places = steps.pop();
    keep(`draft:${current.item}`, places);
    draw();
    announce(`Undone. ${ranking.missing(places)}`);
    return;
  }
  const index = (editing < 0 ? past.length : editing) - 1;
  if (index < 0) { announce("Nothing to undo."); return; }
  clearTimeout(timer);
  if (editing < 0) set = current;
  editing = index;
  const entry = past[index];
  show(entry, entry.ranks ? ranking.fromRanks(entry.ranks) : ranking.blank(entry.answers.length));
}

function stopEditing() {
  editing = -1;
  const before = set;
  set = null;
  if (before) show(before);
  else { current = null; advance(); }
}

/** Show the next item; where none is here, wait for one. */
async function advance() {
  clearTimeout(timer);
  const next = work.next();
  if (next) show(next);
  else wait("One moment", "The next item is on its way.");
  try {
    await work.fill();
    if (!current && !work.items.length) await work.fill(); // the first may have begun before the last answer
    showProgress(work.progress, queue.waiting.length);
    if (!current && editing < 0) {
      const found = work.next();
      if (found) { show(found); return; }
      wait("All done", "Thank you. There is nothing left for you to rank at the moment; new items appear here by themselves.");
      timer = setTimeout(advance, 10 * RETRY_MS);
    }
  } catch (error) {
    if (error instanceof SignedOut) { start(); return; }
    if (!current && editing < 0) {
      wait("No connection", "Your rankings are kept in this browser and are sent when the server can be reached again. Leave this page open.");
      timer = setTimeout(advance, RETRY_MS);
    }
  }
}

function wait(title, text) {
  showOnly("waiting");
  byId("waiting-title").textContent = title;
  byId("waiting-text").textContent = text;
  byId("waiting-undo").hidden = past.length === 0;
}

// --- start ------------------------------------------------------------------------------------------------------------

async function start() {
  study = await signIn();
  document.title = `${study.title} · apportion label`;
  startGuidelines(study);
  for (const name of names("refused:")) notice("An answer was not accepted earlier.", () => keep(name, null));
  await queue.retry();
  const reply = await request("GET", "api/history").catch(() => ({ answers: [] }));
  const unsent = new Set(queue.items);
  if (past.length === 0) past = reply.answers.reverse().filter((one) => !unsent.has(one.item));
  if (current) { show(current, places); return; }
  advance();
}

byId("save").addEventListener("click", save);
byId("skip").addEventListener("click", () => answer("skip", null));
byId("undo").addEventListener("click", undo);
byId("waiting-undo").addEventListener("click", undo);
byId("stop-editing").addEventListener("click", stopEditing);
byId("sign-out").addEventListener("click", () => signOut(queue));
watchDrags(dropped);
const changeView = startView();
listenForKeys({
  size: () => places.length,
  place: (i, tied) => change(i, tied && last >= 0 && last !== i && places[last] > 0 ? ranking.put(places, i, places[last]) : ranking.append(places, i)),
  rank: (i, place) => change(i, place === 0 ? ranking.cannotJudge(places, i) : ranking.put(places, i, place)),
  undo, save, skip: () => answer("skip", null), view: changeView,
});
start();

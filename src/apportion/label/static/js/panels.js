// The bar and the panels around an item: progress, connection, view, guidelines, keys.

import { announce, byId } from "./dom.js";
import { keep, kept } from "./storage.js";

const NARROW = "(max-width: 900px)";

/** Show an annotator's progress; `waiting` answers are on their way. */
export function showProgress(progress, waiting) {
  if (!progress) return;
  const done = progress.ranked + progress.skipped + waiting;
  const left = Math.max(0, progress.left - waiting);
  byId("progress").hidden = false;
  byId("progress-bar").max = Math.max(1, done + left);
  byId("progress-bar").value = done;
  const skipped = progress.skipped ? ` · ${progress.skipped} skipped` : "";
  byId("progress-text").textContent = `${progress.ranked + waiting} ranked${skipped} · ${left} left`;
}

let state = "saved";

/** Show whether everything is saved; a screen reader hears when the connection goes or comes back. */
export function showConnection(next, waiting) {
  const node = byId("connection");
  const texts = { saved: "All saved", saving: "Saving", offline: waiting ? `Offline · ${waiting} kept here` : "Offline" };
  node.hidden = false;
  if (next === "saving" && state === "offline") return; // a retry
  if (next !== state && [next, state].includes("offline")) announce(next === "offline" ? "Offline. Rankings are kept in this browser." : "Back online. All saved.");
  state = next;
  node.dataset.state = next;
  byId("connection-text").textContent = texts[next];
}

/** Set up the switch of the views; returns a function that changes the view. */
export function startView() {
  const narrow = matchMedia(NARROW);
  let view = kept("view", "list", false);
  const apply = () => {
    byId("work").dataset.view = view;
    byId("work").dataset.board = view === "side" || narrow.matches ? "dock" : "side";
    byId("view-list").setAttribute("aria-pressed", String(view === "list"));
    byId("view-side").setAttribute("aria-pressed", String(view === "side"));
  };
  const set = (next) => { view = next; keep("view", view, false); apply(); };
  const pressed = (next) => (event) => {
    set(next);
    if (event.detail > 0) byId("title").focus({ preventScroll: true }); // by mouse: Enter then saves
  };
  byId("view-list").addEventListener("click", pressed("list"));
  byId("view-side").addEventListener("click", pressed("side"));
  narrow.addEventListener("change", apply);
  apply();
  byId("open-keys").addEventListener("click", () => byId("keys").showModal());
  byId("open-guidelines").addEventListener("click", () => byId("guidelines").showModal());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // on the backdrop
  }
  return () => { set(view === "list" ? "side" : "list"); announce(view === "list" ? "List" : "Side by side"); };
}

/** Put the guidelines into their panel, and open it where they are new to the annotator. */
export function startGuidelines(study) {
  byId("open-guidelines").hidden = !study.guidelines;
  byId("guidelines-text").textContent = study.guidelines;
  if (study.guidelines && kept("guidelines") !== study.guidelines.length) {
    keep("guidelines", study.guidelines.length);
    if (!byId("guidelines").open) byId("guidelines").showModal();
  }
}

// Dragging letters by mouse, pen or finger (pointer events): onto a place to tie, between two places to insert.

import { byId, h } from "./dom.js";

const SLACK = 5; // pixels that a press may move and still be a click
const EDGE = 0.28; // share of a row at each end that inserts instead of tying

/** Watch the page for drags; `drop(i, where)` gets {kind: "tie" | "before" | "end" | "none" | "unplaced", place}. */
export function watchDrags(drop) {
  let drag = null;

  document.addEventListener("pointerdown", (event) => {
    const chip = event.target.closest?.("[data-drag]");
    if (!chip || event.button !== 0 || drag) return;
    drag = { chip, answer: Number(chip.dataset.drag), x: event.clientX, y: event.clientY, id: event.pointerId, ghost: null, where: null };
  });

  document.addEventListener("pointermove", (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    if (!drag.ghost) {
      if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < SLACK) return;
      begin();
    }
    drag.ghost.style.setProperty("transform", `translate(${event.clientX}px, ${event.clientY}px)`);
    mark(event.clientX, event.clientY);
    event.preventDefault();
  }, { passive: false });

  document.addEventListener("pointerup", (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    const { answer, where, ghost } = drag;
    end();
    if (!ghost) return;
    window.addEventListener("click", swallow, { capture: true, once: true }); // the click that follows a drag
    setTimeout(() => window.removeEventListener("click", swallow, { capture: true }), 0);
    if (where) drop(answer, where);
  });

  // without it a quick swipe counts as a fling, and the browser takes the next tap for its end
  document.addEventListener("touchmove", (event) => { if (drag) event.preventDefault(); }, { passive: false });
  document.addEventListener("pointercancel", () => { if (drag) end(); });
  document.addEventListener("keydown", (event) => { if (drag && event.key === "Escape") { end(); event.stopPropagation(); } }, true);
  document.addEventListener("dragstart", (event) => event.preventDefault());

  function swallow(event) { event.stopPropagation(); event.preventDefault(); }

  function begin() {
    drag.ghost = h("div", { class: "chip ghost", "aria-hidden": "true" }, drag.chip.textContent);
    document.body.append(drag.ghost);
    document.body.classList.add("dragging");
    drag.chip.classList.add("dragged");
  }

  function end() {
    unmark();
    drag.ghost?.remove();
    drag.chip.classList.remove("dragged");
    document.body.classList.remove("dragging");
    drag = null;
  }

  function unmark() {
    for (const row of byId("places").children) row.classList.remove("drop-tie", "drop-before", "drop-after");
  }

  function mark(x, y) {
    unmark();
    scrollNear(x);
    const row = document.elementFromPoint(x, y)?.closest?.("[data-drop]") ?? nearest(x, y);
    drag.where = row ? target(row, x, y) : null;
    if (!row) return;
    const { kind, after } = drag.where;
    row.classList.add(kind === "before" ? (after ? "drop-after" : "drop-before") : "drop-tie");
  }

  /** A dock that is wider than the screen moves under a letter at its edge. */
  function scrollNear(x) {
    const box = byId("places").getBoundingClientRect();
    if (x > box.right - 36) byId("places").scrollLeft += 12;
    else if (x < box.left + 36) byId("places").scrollLeft -= 12;
  }

  /** Between two rows the nearer one counts. */
  function nearest(x, y) {
    const box = byId("places").getBoundingClientRect();
    if (x < box.left || x > box.right || y < box.top || y > box.bottom) return null;
    const distance = (row) => {
      const r = row.getBoundingClientRect();
      return Math.hypot(Math.max(r.left - x, 0, x - r.right), Math.max(r.top - y, 0, y - r.bottom));
    };
    return [...byId("places").children].sort((a, b) => distance(a) - distance(b))[0] ?? null;
  }

  function target(row, x, y) {
    const [kind, place] = row.dataset.drop.split(":");
    if (kind !== "group") return { kind };
    const r = row.getBoundingClientRect();
    const flat = getComputedStyle(byId("places")).flexDirection === "row";
    const share = flat ? (x - r.left) / r.width : (y - r.top) / r.height;
    const rank = Number(place);
    if (share < EDGE) return { kind: "before", place: rank, after: false };
    if (share > 1 - EDGE) return { kind: "before", place: rank + 1, after: true };
    return { kind: "tie", place: rank };
  }
}

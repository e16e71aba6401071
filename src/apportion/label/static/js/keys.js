// Keys of the whole page. Single keys can be switched off: a screen reader has its own.

import { byId } from "./dom.js";
import { LETTERS } from "./ranking.js";
import { keep, kept } from "./storage.js";

/** Listen for keys; `does` has place(i, tied), rank(i, place), undo(), save(), skip(), view(). */
export function listenForKeys(does) {
  const box = byId("keys-on");
  let tie = false;
  box.checked = kept("keys", true, false);
  box.addEventListener("change", () => keep("keys", box.checked, false));

  document.addEventListener("keydown", (event) => {
    if (byId("work").hidden || document.querySelector("dialog[open]") || event.defaultPrevented || event.isComposing) return;
    const command = event.ctrlKey || event.metaKey;
    if (command && event.key === "Enter") return act(event, does.save);
    if (command && event.key.toLowerCase() === "z" && !event.shiftKey) return act(event, does.undo);
    if (command || event.altKey || !box.checked || event.repeat) return;
    if (event.key === "Enter") {
      if (!event.target.closest?.("button:not(.chip), a, summary")) act(event, does.save);
      return;
    }
    const key = event.key.toUpperCase();
    const answer = LETTERS.indexOf(key);
    if (key === "=") { tie = true; return act(event, () => {}); }
    if (key.length === 1 && answer >= 0 && answer < does.size()) {
      const tied = tie;
      tie = false;
      return act(event, () => does.place(answer, tied));
    }
    const card = event.target.closest?.("[data-answer], [data-drag]");
    if (card && /^[0-9]$/.test(key) && Number(key) <= does.size()) {
      return act(event, () => does.rank(Number(card.dataset.answer ?? card.dataset.drag), Number(key)));
    }
    const others = { BACKSPACE: does.undo, S: does.skip, V: does.view };
    if (others[key]) act(event, others[key]);
  });
}

function act(event, run) {
  event.preventDefault();
  run();
}

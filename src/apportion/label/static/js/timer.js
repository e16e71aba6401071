// Seconds spent on an item: while the page is visible and somebody is there.

const IDLE_MS = 120000; // without a sign of life the clock stops

let spent = 0;
let from = performance.now(); // counted until here
let alive = from; // the last sign of life
let visible = !document.hidden;

function count() {
  const now = performance.now();
  if (visible) spent += Math.max(0, Math.min(now, alive + IDLE_MS) - from);
  from = now;
}

document.addEventListener("visibilitychange", () => {
  count();
  visible = !document.hidden;
  alive = from;
});
for (const name of ["pointerdown", "pointermove", "keydown", "scroll", "wheel"]) {
  document.addEventListener(name, () => { count(); alive = from; }, { passive: true, capture: true });
}

export function startTimer() {
  count();
  spent = 0;
  alive = from;
}

/** Return the seconds since `startTimer`, to a tenth. */
export function seconds() {
  count();
  return Math.round(spent / 100) / 10;
}

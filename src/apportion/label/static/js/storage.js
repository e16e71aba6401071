// What the browser keeps: answers that were not acknowledged, drafts, and choices of the annotator.

let prefix = "apportion-label";
const memory = new Map(); // where the browser refuses storage

/** Keep what follows apart by study and annotator. */
export function setOwner(study, annotator) {
  prefix = `apportion-label:${study}:${annotator}`;
}

const full = (name, own) => `${own ? prefix : "apportion-label"}:${name}`;

/** Keep `value` (JSON) under `name`; null removes it. Returns whether it will survive the page. */
export function keep(name, value, own = true) {
  const key = full(name, own);
  try {
    if (value === null) { localStorage.removeItem(key); memory.delete(key); }
    else localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    if (value !== null) memory.set(key, value);
    return value === null;
  }
}

/** Return what is kept under `name`, or `otherwise`. */
export function kept(name, otherwise = null, own = true) {
  const key = full(name, own);
  if (memory.has(key)) return memory.get(key);
  try {
    const text = localStorage.getItem(key);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Return the names that start with `start`, sorted. */
export function names(start) {
  const begin = full(start, true);
  const found = new Set([...memory.keys()].filter((key) => key.startsWith(begin)));
  try {
    for (let i = 0; i < localStorage.length; i += 1) if (localStorage.key(i).startsWith(begin)) found.add(localStorage.key(i));
  } catch { /* only memory */ }
  return [...found].sort().map((key) => key.slice(prefix.length + 1));
}

/** Return 128 random bits as text; crypto.randomUUID is absent on plain http. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Items to rank: a few are fetched ahead, so that the next one is there at once, also offline.

import { request } from "./api.js";

const AHEAD = 4; // the item on the screen among them
const MOST = 10; // that a request may ask for

export class Work {
  /** `onScreen()` returns the item that is shown or null, `waiting()` the items whose answers are on their way. */
  constructor(onScreen, waiting) {
    this.onScreen = onScreen;
    this.waiting = waiting;
    this.answered = new Set(); // since the page was loaded: a reply may be older than an answer
    this.items = [];
    this.progress = null;
    this.loading = null;
  }

  /** Fetch until `AHEAD` items are here; items that went to others meanwhile are dropped. */
  fill() {
    this.loading ??= this.load().finally(() => { this.loading = null; });
    return this.loading;
  }

  async load() {
    const shown = this.onScreen();
    const have = new Map([...this.items, ...(shown ? [shown] : [])].map((one) => [one.item, one]));
    const count = Math.min(MOST, AHEAD + this.waiting().length);
    const reply = await request("POST", "api/work", { count, have: [...have.keys()].slice(0, 20) });
    this.progress = reply.progress;
    const others = new Set([...this.answered, ...this.waiting(), this.onScreen()?.item]);
    this.items = reply.items.map((one) => have.get(one.item) ?? one).filter((one) => one.answers && !others.has(one.item));
  }

  /** Take the next item, or null where none is here. */
  next() { return this.items.shift() ?? null; }
}

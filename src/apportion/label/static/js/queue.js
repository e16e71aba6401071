// Answers on their way to the server: each is kept in the browser until the server has acknowledged it, and sent in the
// order in which they were made. A copy that is sent twice has the same id, by which the server recognises it.

import { Refused, SignedOut, request } from "./api.js";
import { keep, kept, names, newId } from "./storage.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15000;

export class Queue {
  /** `on` has: state("saved" | "saving" | "offline", waiting), acknowledged(reply, answer), refused(text, name), signedOut(). */
  constructor(on) {
    this.on = on;
    this.sending = false;
    this.pause = FIRST_PAUSE_MS;
    this.timer = 0;
    this.count = 0;
    window.addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.retry(); });
  }

  /** Names of the answers that wait. */
  get waiting() { return names("queue:"); }

  /** Items that an answer waits for. */
  get items() { return this.waiting.map((name) => kept(name)?.item); }

  /** Keep an answer and send it; returns it with its id. */
  add(answer) {
    const whole = { id: newId(), ...answer };
    this.count += 1;
    const order = `${String(Date.now()).padStart(15, "0")}-${String(this.count).padStart(5, "0")}`;
    keep(`queue:${order}`, whole);
    this.retry();
    return whole;
  }

  /** Send now, whatever the pause. */
  retry() {
    clearTimeout(this.timer);
    this.pause = FIRST_PAUSE_MS;
    return this.flush();
  }

  /** Send all that waits, one after the other; after a failure again later. */
  async flush() {
    if (this.sending) return;
    this.sending = true;
    try {
      for (let name = this.waiting[0]; name !== undefined; name = this.waiting[0]) {
        this.on.state("saving", this.waiting.length);
        await this.send(name, kept(name));
        this.pause = FIRST_PAUSE_MS;
      }
      this.on.state("saved", 0);
    } catch (error) {
      this.on.state("offline", this.waiting.length);
      if (error instanceof SignedOut) this.on.signedOut();
      else this.again();
    } finally {
      this.sending = false;
    }
  }

  async send(name, answer) {
    if (answer === null) { keep(name, null); return; }
    try {
      const reply = await request("POST", "api/answers", answer);
      keep(name, null);
      this.on.acknowledged(reply, answer);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const moved = name.replace("queue:", "refused:"); // stays in the browser until it is dismissed
      keep(moved, answer);
      keep(name, null);
      this.on.refused(error.message, moved);
    }
  }

  again() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.flush(), this.pause * (0.75 + 0.5 * Math.random()));
    this.pause = Math.min(LONGEST_PAUSE_MS, this.pause * 2);
  }
}

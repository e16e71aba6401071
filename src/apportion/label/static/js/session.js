// Signing in and out.

import { Refused, request } from "./api.js";
import { byId, showOnly } from "./dom.js";
import { setOwner } from "./storage.js";

const RETRY_MS = 2000;

/** Return the study, {title, guidelines, annotator, …}, once somebody has signed in. */
export async function signIn() {
  let study = await about();
  if (!study.annotator) {
    await form(study);
    study = await about();
  }
  setOwner(study.study, study.annotator);
  byId("annotator").textContent = study.annotator;
  byId("tools").hidden = false;
  return study;
}

/** Sign out: what was not sent stays in the browser until the same person signs in again. */
export async function signOut(queue) {
  const waiting = queue.waiting.length;
  if (waiting && !confirm(`${waiting} answers were not sent. They stay in this browser until you sign in again. Sign out?`)) return;
  await request("DELETE", "api/session").catch(() => null);
  location.reload();
}

async function about() {
  for (;;) {
    try {
      return await request("GET", "api/study");
    } catch {
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

function form(study) {
  showOnly("sign-in");
  byId("tools").hidden = true;
  byId("token-field").hidden = !study.needs_token;
  byId("token").required = study.needs_token;
  byId("token").value = new URLSearchParams(location.hash.slice(1)).get("token") ?? byId("token").value;
  if (location.hash.includes("token=")) history.replaceState(null, "", location.pathname); // not in the history
  byId("name").focus();
  return new Promise((resolve) => {
    byId("sign-in-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      byId("sign-in-problem").textContent = "";
      try {
        await request("POST", "api/session", { name: byId("name").value, token: byId("token").value });
        resolve();
      } catch (error) {
        byId("sign-in-problem").textContent = error instanceof Refused ? `${error.message}` : "The server cannot be reached. Try again.";
      }
    });
  });
}

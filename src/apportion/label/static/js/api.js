// Requests to the server. A failure is one of three: unreachable (try again), signed out, or refused for good.

export class Unreachable extends Error {}
export class SignedOut extends Error {}
export class Refused extends Error {
  constructor(status, error) {
    super(`${error.field}: got ${error.got}; expected ${error.expected}. ${error.fix}`);
    this.status = status;
    this.fix = error.fix;
  }
}

const PATIENCE_MS = 15000;

/** Return the JSON that the server sends for `method` and `path`. */
export async function request(method, path, body = null) {
  let response;
  try {
    response = await fetch(path, {
      method,
      credentials: "same-origin",
      keepalive: method !== "GET", // finishes although the page is closed
      signal: AbortSignal.timeout(PATIENCE_MS),
      headers: { "X-Apportion": "1", ...(body === null ? {} : { "Content-Type": "application/json" }) },
      body: body === null ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    throw new Unreachable(String(error));
  }
  if (response.status === 401) throw new SignedOut();
  if (response.status >= 500 || response.status === 429 || response.status === 408) throw new Unreachable(`status ${response.status}`);
  const content = await response.json().catch(() => null);
  if (content === null) throw new Unreachable("an answer that is no JSON");
  if (!response.ok) throw new Refused(response.status, content.error ?? {});
  return content;
}

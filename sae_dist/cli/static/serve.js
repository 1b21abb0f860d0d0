// Asks for the page again every few seconds while somebody looks, and puts what has changed in its place.
"use strict";
const EVERY_MS = 5000;
const seen = document.getElementById("seen");

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch("./", { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server says: ${(await answer.text()).trim()}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const [old, now] = [document.getElementById("live"), page.getElementById("live")];
    if (old.outerHTML !== now.outerHTML && !getSelection().toString()) {
      const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      old.replaceWith(now);
      if (focused !== null) now.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    }
    seen.textContent = `as of ${new Date().toLocaleTimeString()}`;
    seen.classList.remove("lost");
  } catch (error) {
    seen.textContent = error instanceof TypeError ? "the server does not answer; the figures are those it gave last" : error.message;
    seen.classList.add("lost");
  }
}

(async () => {
  for (;;) {
    await new Promise(done => setTimeout(done, EVERY_MS));
    await refresh();
  }
})();
document.addEventListener("visibilitychange", refresh);
